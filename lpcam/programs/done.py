"""``DONE.json``: which config a run was finished with, its metrics, and what it took.

Imports nothing heavy, so that a run that is done says so at once.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.storage.hashing import digest

if TYPE_CHECKING:
    from lpcam.programs.run import Results

from lpcam.storage.files import write_json


def done_metrics(output: Path, config: Mapping[str, Any]) -> dict[str, float] | None:
    """The metrics of a run that was finished in this folder with this config; None if none was."""
    path = output / "DONE.json"
    try:
        done = json.loads(path.read_text())
        metrics: dict[str, float] = done["metrics"]
        return metrics if done["config"] == config_digest(config) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def config_digest(config: Mapping[str, Any]) -> str:
    """Hash a run's config without where its files go, and with the version that read it."""
    wanted = {name: value for name, value in config.items() if name not in ("paths", "logger")}
    return digest({**wanted, "version": version("lpcam")})


def write_done(output: Path, config: Mapping[str, Any], results: "Results", total: float) -> None:
    """Mark a run as finished; the last file that it writes.

    Args:
        output: The run's folder.
        config: Its resolved config.
        results: What its stages gave.
        total: Seconds that the run took. Those of each stage that it computed itself stand beside.
    """
    seconds = {"total": total}
    for name, stage in results.stages.items():
        if stage.seconds is not None:
            seconds[name] = stage.seconds
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    done = {"config": config_digest(config), "seconds": rounded, "metrics": dict(results.metrics)}
    write_json(output / "DONE.json", done)


def headline(metrics: Mapping[str, float], split: str) -> float | None:
    """The one number of a run: mIoU of the refined maps, or of LPCAM; None without masks."""
    found = (metrics.get(f"{split}/{stage}/miou") for stage in ("refined", "lpcam"))
    return next((value for value in found if value is not None), None)
