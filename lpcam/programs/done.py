"""``DONE.json``: what a run was finished with, its metrics, and what it took.

Imports nothing heavy, so that a run that is done says so at once.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lpcam.errors import InputError
from lpcam.programs.build import build
from lpcam.storage.files import write_json
from lpcam.storage.hashing import digest, file_digest
from lpcam.storage.store import Stage

if TYPE_CHECKING:
    from lpcam.data.dataset import SegmentationDataset

# Folders and files of a run, and the endings of what it writes into a folder.
FOLDERS = {"maps": ".npz", "refined": ".npz", "masks": ".png", "figures": ".png"}
FILES = (
    "report.html",
    "metrics.json",
    "prototypes.safetensors",
    "network.safetensors",
    "config.yaml",
)


def done_metrics(
    output: Path, config: Mapping[str, Any], *, report: bool = False
) -> dict[str, float] | None:
    """The metrics of a run that was finished in this folder with this config; None if none was.

    A run is not done if one of the files that it was made from or that it made is another now, or
    gone.

    Args:
        output: The run's folder.
        config: Its resolved config.
        report: Whether a report belongs to it.
    """
    try:
        done = json.loads((output / "DONE.json").read_text())
        metrics = checked_metrics(done)
        if report and "report.html" not in done["outputs"]:
            return None
        if done["config"] == _config_digest(config) and done["outputs"] == _outputs(output):
            return metrics if done["inputs"] == inputs_digest(config) else None
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        pass
    return None


def checked_metrics(done: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a record holds, if they are those that the run wrote.

    Raises:
        InputError: They were altered since.
        KeyError: There are none.
    """
    metrics: dict[str, float] = done["metrics"]
    if done["check"] != digest(metrics):
        raise InputError("DONE.json: its metrics were altered; delete it and run again")
    return metrics


def _config_digest(config: Mapping[str, Any]) -> str:
    """Hash what a run's results depend on, and the version that read it."""
    others = ("paths", "logger", "report")
    wanted = {name: value for name, value in config.items() if name not in others}
    return digest({**wanted, "version": version("lpcam")})


def inputs_digest(config: Mapping[str, Any]) -> str:
    """Hash size and time of pictures, masks, and the files that the config names."""
    groups = ("ckpt", "backbone", "refiner")  # the others name no file that is read
    named = {name: config.get(name) for name in groups}
    if config.get("masks"):
        named["masks"] = [
            f"{config['masks']}{inside}" for inside in ("", "/masks", "/maps", "/refined")
        ]
    files = _files(named)
    stamps = [[str(path), *_stamp(path)] for path in files]
    return digest([_data_digest(json.dumps(config["dataset"])), stamps])


@functools.lru_cache(maxsize=1)
def _data_digest(text: str) -> str:
    """Hash what the pictures and masks of a data set's config are; once for the jobs of a sweep."""
    from lpcam.data.dataset import fingerprint

    dataset: SegmentationDataset = build(OmegaConf.create({"dataset": json.loads(text)}).dataset)
    dataset.prepare(labelled=False)  # told where they are needed
    rows = []
    for split in dataset.used_splits:
        pictures = dataset.pictures(split)
        masks = [_stamp(p.mask_path) if p.mask_path else dataset.mask_digest(p) for p in pictures]
        rows.append([split, fingerprint(pictures), digest(masks)])
    return digest(rows)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _files(value: Any) -> Iterator[Path]:
    """The files that the texts of a config name, and those in the folders that they name."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("_target_", "name", "source"):
                yield from _files(item)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item)
    elif isinstance(value, str) and value:
        path = Path(value).expanduser()
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (file for file in found if file.is_file())


def _written(output: Path) -> list[Path]:
    """The files that a run may write beside its folders, those that are there."""
    named = (output / name for name in FILES)
    return [*(path for path in named if path.is_file()), *sorted(output.glob("instances_*.json"))]


def _outputs(output: Path) -> dict[str, int | str]:
    """What lies in a run's folder: the number of files in a folder, or the hash of a file."""
    found: dict[str, int | str] = {path.name: file_digest(path) for path in _written(output)}
    for name, suffix in FOLDERS.items():
        if (output / name).is_dir():
            found[name] = sum(path.suffix == suffix for path in (output / name).iterdir())
    return found


def look_again() -> None:
    """Forget what files were like; a command that starts looks at them."""
    _data_digest.cache_clear()


def clear(output: Path) -> None:
    """Remove what an earlier run left in this folder, that nothing of it stands beside the new."""
    (output / "DONE.json").unlink(missing_ok=True)
    try:
        earlier = (output / "config.yaml").read_text()
    except OSError:
        return
    ours = (("prototypes:", "thresholds:"), ("segmenter:", "masks:"))
    if not any(all(key in earlier for key in keys) for keys in ours):
        return  # somebody else's folder
    for name, suffix in FOLDERS.items():
        for path in (output / name).glob(f"*{suffix}"):
            path.unlink()
    for path in _written(output):
        path.unlink()


def write_done(
    output: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    stages: Mapping[str, Stage],
    total: float,
) -> None:
    """Mark a run as finished; the last file that its results need.

    Args:
        output: The run's folder.
        config: Its resolved config.
        metrics: What ``metrics.json`` holds.
        stages: Its stages; the seconds of those that it computed itself are told.
        total: Seconds that the run took.
    """
    seconds = {"total": total}
    for name, stage in stages.items():
        if stage.seconds is not None:
            seconds[name] = stage.seconds
    done = {
        "config": _config_digest(config),
        "inputs": inputs_digest(config),
        "outputs": _outputs(output),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "metrics": dict(metrics),
        "check": digest(dict(metrics)),
    }
    write_json(output / "DONE.json", done)


def headline(metrics: Mapping[str, float], split: str) -> float | None:
    """The one number of a run: mIoU of its last stage; None without masks."""
    stages = ("segmented_crf", "segmented", "refined", "lpcam")
    found = (metrics.get(f"{split}/{stage}/miou") for stage in stages)
    return next((value for value in found if value is not None), None)
