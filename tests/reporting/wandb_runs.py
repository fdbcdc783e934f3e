"""Runs of a small study as W&B records them offline, read back with W&B's own reader."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpcam.evaluation import SegmentationResult
from lpcam.reporting import tracking, wandb_content
from lpcam.reporting.shown import Shown

CLASSES = ("cat", "dog")
# Confusion matrices (true, predicted) of 100 pixels of background, cat and dog; by hand:
# all right; cat never found, so that its precision is unknown; all background.
ALL = [[40, 0, 0], [0, 30, 0], [0, 0, 30]]
NO_CAT = [[40, 0, 0], [30, 0, 0], [0, 0, 30]]
NONE = [[40, 0, 0], [30, 0, 0], [30, 0, 0]]
SCORES = {
    "cam": {"val": SegmentationResult(np.array([0, 0.5, 1]), np.array([NO_CAT, NONE, NONE]))},
    "lpcam": {"val": SegmentationResult(np.array([0, 0.5, 1]), np.array([NO_CAT, ALL, NONE]))},
}
METRICS = {
    f"val/{stage}/{key}": value
    for stage, by_split in SCORES.items()
    for key, value in by_split["val"].metrics(CLASSES, 0.5).items()
}
CHOICES = {"backbone": "lite", "classifier": "frozen", "refiner": "par"}


@contextlib.contextmanager
def logged_out(home: Path) -> Iterator[None]:
    """Inside it nobody is logged in to W&B."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(home / "no-netrc"))
        yield


def logger(folder: Path, **kwargs: Any) -> Any:
    return tracking.wandb_logger(str(folder), "project", **kwargs)


@dataclass(frozen=True)
class Run:
    """What W&B's own reader finds in the run file of a folder."""

    folder: Path
    records: list[dict[str, Any]]

    def all(self, kind: str) -> list[Any]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def config(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for record in self.all("config"):
            merged |= record["update"]
        return merged

    @property
    def history(self) -> dict[str, Any]:
        """All that was logged; parts of a picture or table as ``<key>.<part>``."""
        merged: dict[str, Any] = {}
        for record in self.all("history"):
            merged |= record["item"]
        return merged

    @property
    def artifacts(self) -> dict[str, dict[str, Any]]:
        found = [a for a in self.all("artifact") if a["type"] != "run_table"]
        return {artifact["name"]: artifact for artifact in found}

    def file(self, path: str) -> Path:
        return self.folder / "files" / path

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        found = json.loads(self.file(self.history[f"{key}.path"]).read_text())
        return found["columns"], found["data"]


def read(folder: Path) -> Run:
    """Read the newest run file in a run's folder."""
    from wandb.util import get_core_path

    # What ``wandb leet inspect --json`` calls, without the seconds that its start takes.
    newest = (folder / "wandb" / "latest-run").resolve()
    (path,) = newest.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
    command += ["--run-file", str(path), str(newest.parent)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # its last records are written a moment after it ended
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode == 0 and records and records[-1]["type"] == "exit":
            return Run(newest, records)
        time.sleep(0.05)
    raise TimeoutError(f"{path}: {done.stderr or 'no end'}")


def shown(pixel: int) -> Shown:
    truth = np.zeros((48, 64), np.uint8)
    truth[:8], truth[8:16], truth[40:] = 1, 2, 255
    masks = {"truth": truth, "lpcam": np.full((48, 64), pixel, np.uint8)}
    return Shown("2007_000032", Image.new("RGB", (64, 48), (200, 10, 10)), masks)


def log_study(root: Path) -> list[Run]:
    """Two settings of a study, and before them the training of their classifier."""
    (root / "last.ckpt").write_bytes(b"weights")
    with tracking.recording():
        log = tracking.start(
            logger(root / "train", job_type="train"), {}, CHOICES, {"val/map": "max"}
        )
        for step, value in enumerate((0.2, 0.9, 0.6)):
            log.log_metrics({"val/map": value}, step)
        wandb_content.log_files(log, {"classifier-abc": root / "last.ckpt"})
    for k in (4, 12):
        folder = root / f"k{k}"
        with tracking.recording():
            config = {
                "prototypes": {"k": k, "use": "both"},
                "thresholds": {"activation": 0.1, "class_score": 0.9, "context_score": 0.8},
                "refiner": {"source": "cam"},
                "seed": 3,
            }
            log = logger(folder, group="sweep_k", job_type="infer", tags=["shapes", "lite"])
            for name in ("prototypes.safetensors", "metrics.json"):
                (folder / name).write_text(f"{name} {k}")
            Image.new("RGB", (20, 10)).save(folder / "gallery.png")
            wandb_content.log_results(
                tracking.start(log, config, CHOICES),
                metrics=METRICS,
                scores=SCORES,
                classes=CLASSES,
                figures=[folder / "gallery.png"],
                shown=[shown(pixel=1 if k == 4 else 2)],
                made={
                    "prototypes": folder / "prototypes.safetensors",
                    "metrics": folder / "metrics.json",
                },
                used={"classifier-abc": root / "last.ckpt"},
            )
    return [read(root / name) for name in ("train", "k4", "k12")]
