"""Real offline runs, read back with W&B's own reader of its run files."""

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from experiments import dashboard
from lpcam.evaluation import SegmentationResult
from lpcam.reporting import tracking
from lpcam.reporting.shown import Shown
from tests.conftest import TINY, TINY_INFER, at

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


@pytest.fixture(autouse=True, scope="module")
def nobody_is_logged_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "no-netrc"))
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
        own = [a for a in self.all("artifact") if a["type"] != "run_table"]
        return {artifact["name"]: artifact for artifact in own}

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two settings of a study, and before them the training of their classifier."""
    root = tmp_path_factory.mktemp("study")
    (root / "last.ckpt").write_bytes(b"weights")
    with tracking.recording():
        log = tracking.start(
            logger(root / "train", job_type="train"), {}, CHOICES, {"val/map": "max"}
        )
        for step, value in enumerate((0.2, 0.9, 0.6)):
            log.log_metrics({"val/map": value}, step)
        tracking.log_files(log, {"classifier-abc": root / "last.ckpt"})
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
            tracking.log_results(
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


def test_each_job_of_a_process_is_a_run_of_its_own(pair: list[Run]) -> None:
    ids = [run.all("run")[0]["run_id"] for run in pair]
    assert len(set(ids)) == 3
    assert ids == [(run.folder.parents[1] / "wandb_id.txt").read_text() for run in pair]
    assert [run.all("exit")[0]["exit_code"] for run in pair] == [0, 0, 0]


def test_runs_of_a_study_are_found_by_group_and_told_apart_by_columns(pair: list[Run]) -> None:
    for run, k in zip(pair[1:], (4, 12), strict=True):
        first, *_, last = run.all("run")
        assert first["project"] == "project"
        assert first["run_group"] == "sweep_k"
        assert first["job_type"] == "infer"
        assert first["tags"] == ["shapes", "lite"]
        assert last["display_name"] == f"k{k} tau0.1 muf0.9 mub0.8 par(cam) seed3"
        assert (
            run.config.items()
            >= {
                "prototypes/k": k,
                "thresholds/class_score": 0.9,
                "thresholds/context_score": 0.8,
                "refiner/source": "cam",
                "backbone": "lite",
                "refiner": "par",
                "refined": "par(cam)",
                "seed": 3,
            }.items()
        )


def test_metrics_have_the_names_of_the_file_and_a_maximum(pair: list[Run]) -> None:
    for run in pair[1:]:
        assert run.history.items() >= METRICS.items()
        summaries = {m["name"]: m["summary"] for m in run.all("metric") if "summary" in m}
        assert summaries == {"val/cam/miou": {"max": True}, "val/lpcam/miou": {"max": True}}


def test_the_best_epoch_is_the_summary_of_training(pair: list[Run]) -> None:
    summary = {}
    for record in pair[0].all("summary"):
        summary |= record["update"]
    assert summary["val/map"] == {"max": 0.9}


def test_the_curve_has_every_threshold_of_every_stage(pair: list[Run]) -> None:
    columns, rows = pair[1].table("val/curve_table")
    assert columns == ["stage", "threshold", "miou", "precision", "recall"]
    # NO_CAT: IoU 40/70, 0, 1. NONE: IoU 40/100, 0, 0.
    no_cat, none = (40 / 70 + 1) / 3, 0.4 / 3
    expected = [
        ["cam", 0, no_cat, 1, 0.5],
        ["cam", 0.5, none, None, 0],
        ["cam", 1, none, None, 0],
        ["lpcam", 0, no_cat, 1, 0.5],
        ["lpcam", 0.5, 1, 1, 1],
        ["lpcam", 1, none, None, 0],
    ]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    for row, right in zip(rows, expected, strict=True):
        assert row[2:] == [None if v is None else pytest.approx(v) for v in right[2:]]
    chart = pair[1].config["_wandb.visualize.val/curve"]["panel_config"]
    assert chart["fieldSettings"] == {"x": "threshold", "y": "miou", "stroke": "stage"}


def test_the_class_table_is_at_each_stages_best_threshold(pair: list[Run]) -> None:
    columns, rows = pair[1].table("val/classes")
    assert columns == ["class", "cam", "lpcam"]
    assert rows == [["background", pytest.approx(4 / 7), 1], ["cat", 0, 1], ["dog", 1, 1]]


def test_every_run_shows_the_same_pictures_under_the_same_keys(pair: list[Run]) -> None:
    keys = [
        {key for key in run.history if key.startswith(("pictures/", "overlays/"))}
        for run in pair[1:]
    ]
    assert keys[0] == keys[1]
    for run, pixel in zip(pair[1:], (1, 2), strict=True):
        own = shown(pixel)
        key = "pictures/2007_000032"
        with Image.open(run.file(run.history[f"{key}.path"])) as picture:
            assert picture.size == (64, 48)
            assert np.allclose(np.asarray(picture)[20, 20], (200, 10, 10), atol=4)
        for name, mask in own.masks.items():
            with Image.open(run.file(run.history[f"{key}.masks.{name}.path"])) as stored:
                assert (np.asarray(stored) == mask).all()
            labels = run.config["_wandb"]["mask/class_labels"][f"{key}_wandb_delimeter_{name}"]
            assert labels["value"] == {
                "0": "background",
                "1": "cat",
                "2": "dog",
                "255": "unknown",
            }
        assert run.history["overlays/2007_000032.captions"] == ["picture", "truth", "lpcam"]
        drawn = run.history["overlays/2007_000032.filenames"]
        assert len(drawn) == len(set(drawn)) == 3
        for path in drawn:
            with Image.open(run.file(path)) as picture:
                assert picture.size == (64, 48)
        with Image.open(run.file(run.history["figures/gallery.path"])) as figure:
            assert figure.size == (20, 10)


def test_artifacts_lead_from_the_classifier_to_the_results(pair: list[Run]) -> None:
    trained = pair[0].artifacts["classifier-abc"]
    assert trained["type"] == "classifier"
    for run in pair[1:]:
        assert run.artifacts.keys() == {"prototypes", "metrics", "classifier-abc"}
        used = run.artifacts["classifier-abc"]
        assert used["use_after_commit"]
        assert used["digest"] == trained["digest"]
        made = run.artifacts["metrics"]
        assert "use_after_commit" not in made
        (entry,) = made["manifest"]["contents"]
        assert Path(entry["local_path"]) == run.folder.parents[1] / "metrics.json"
    assert len({run.artifacts["prototypes"]["digest"] for run in pair[1:]}) == 2


def test_what_is_to_be_sent_lies_in_the_runs_folder(pair: list[Run]) -> None:
    for run in pair[1:]:
        root = run.folder.parents[2]
        for artifact in run.all("artifact"):
            for entry in artifact["manifest"]["contents"]:
                path = Path(entry["local_path"])
                assert path.is_relative_to(root)
                assert path.stat().st_size == int(entry["size"])


def test_the_dashboard_shows_what_runs_log(pair: list[Run]) -> None:
    spec = dashboard.specification("p", "e", "sweep_k", "val", ["2007_000032"])
    run = pair[1]
    summary = {key for record in run.all("summary") for key in record["update"]}
    media = {key.rsplit(".", 1)[0] for key in run.history}
    columns, _ = run.table("val/curve_table")
    workspace, report = dashboard.build(spec)  # which checks every name and type
    assert [section.name for section in workspace.sections] == [s["name"] for s in spec["sections"]]
    assert len(report.blocks) == 2 * len(workspace.sections)
    for panel in (panel for section in spec["sections"] for panel in section["panels"]):
        values = [panel.get(name) for name in ("x", "y", "z", "groupby")]
        for value in [*values, *panel.get("columns", [])]:
            if value and value.startswith("config."):
                assert value.removeprefix("config.") in run.config
            elif value:
                assert value.removeprefix("summary.").removesuffix(".max") in summary
        for key in panel.get("media_keys", []):
            assert key in media
        if "table_name" in panel:
            assert panel["table_name"] in media
        if "query" in panel:
            assert panel["query"]["summaryTable"]["tableKey"] in media
            assert set(panel["chart_fields"].values()) <= set(columns)


def run_dashboard(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *arguments])
    dashboard.main()


def test_without_a_login_the_dashboard_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first.json", "second.json"):
        run_dashboard(
            monkeypatch, "--group", "sweep_k", "--pictures", "a", "--output", str(tmp_path / name)
        )
    printed = capsys.readouterr().out
    assert "Not logged in" in printed
    assert "Thresholds" in printed
    text = (tmp_path / "first.json").read_text()
    assert text == (tmp_path / "second.json").read_text()
    spec = json.loads(text)
    assert spec["group"] == "sweep_k"
    panels = {section["name"]: section["panels"] for section in spec["sections"]}
    assert panels.keys() == {"Prototypes", "Thresholds", "Refiners", "Classes", "Pictures"}
    assert panels["Pictures"][0]["media_keys"] == ["pictures/a"]


def run_id(folder: Path) -> str:
    with tracking.recording():
        tracking.start(logger(folder), {}, {})
    return read(folder).all("run")[0]["run_id"]


def test_a_killed_run_goes_on_under_its_id_a_finished_one_does_not(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert (tmp_path / "wandb_id.txt").read_text() == first
    assert run_id(tmp_path) == first
    (tmp_path / "DONE.json").write_text("{}")
    second = run_id(tmp_path)
    assert second != first
    assert (tmp_path / "wandb_id.txt").read_text() == second
    (tmp_path / "DONE.json").unlink()
    (tmp_path / "wandb_id.txt").write_text("../../elsewhere\n")
    assert run_id(tmp_path) not in (first, second)


def test_the_id_is_on_disk_before_anything_is_logged(tmp_path: Path) -> None:
    logger(tmp_path)
    assert (tmp_path / "wandb_id.txt").is_file()
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_equal_seeds_give_different_ids(tmp_path: Path) -> None:
    ids = set()
    for i in range(20):
        random.seed(0)
        pl.seed_everything(0, verbose=False)
        logger(tmp_path / str(i))
        ids.add((tmp_path / str(i) / "wandb_id.txt").read_text())
    assert len(ids) == 20


def occupied(folder: Path, _: Any) -> None:
    """A file where the folder of W&B should be."""
    (folder / "wandb").write_text("")


def gone(_: Path, __: Any) -> None:
    """The process that writes W&B's file is away."""
    import wandb

    wandb.teardown()


@pytest.mark.parametrize(("fault", "started"), [(occupied, False), (gone, True)])
def test_a_failure_is_one_line_and_the_next_job_is_logged(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Path, Any], None],
    started: bool,
) -> None:
    with tracking.recording():
        log = logger(tmp_path / "bad")
        if started:
            tracking.start(log, {}, {})
        fault(tmp_path / "bad", log)
        tracking.start(log, {}, {})
        tracking.log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: not logged, results are not affected: ")

    with tracking.recording():
        log = tracking.start(logger(tmp_path / "good"), {}, {})
        tracking.log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
    assert capsys.readouterr().err == ""
    assert read(tmp_path / "good").history.items() >= METRICS.items()


def test_an_error_elsewhere_is_raised_and_marks_the_run_as_failed(tmp_path: Path) -> None:
    tracking.start(logger(tmp_path), {}, {})

    def fail() -> None:
        try:
            _ = 1 / 0
        finally:
            tracking.finish()

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read(tmp_path).all("exit")[0]["exit_code"] == 1


def test_wandb_can_be_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "file").write_text("")
    with tracking.recording():
        log = tracking.start(logger(tmp_path), {"seed": 0}, CHOICES)
        tracking.log_results(
            log,
            metrics=METRICS,
            scores=SCORES,
            classes=CLASSES,
            shown=[shown(1)],
            made={"file": tmp_path / "file"},
        )
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_other_loggers_get_settings_and_metrics(tmp_path: Path) -> None:
    log = tracking.start(CSVLogger(tmp_path, "csv", ""), {"prototypes": {"k": 4}}, CHOICES)
    with tracking.recording():
        tracking.log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["val/lpcam/miou"]) == 1
    assert "prototypes/k: 4" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_programs_log_a_sweep_although_its_first_job_cannot(program, tmp_path: Path) -> None:
    short = ("classifier.epochs=20", "classifier.validate_every=10", "classifier.batch_size=8")
    wandb = ("logger=wandb", "dataset.map_splits=[val]", f"paths.root={tmp_path}")
    trained = program("train", *TINY, *short, *wandb, *at(tmp_path, "train"))
    assert trained.status == 0, trained.stderr
    sweep = tmp_path / "sweep"
    (sweep / "0").mkdir(parents=True)
    occupied(sweep / "0", None)
    overrides = (*TINY, *TINY_INFER, *short, *wandb, f"hydra.sweep.dir={sweep}")
    overrides += ("hydra.sweep.subdir=${hydra.job.num}", "report=false")
    outcome = program("infer", "-m", *overrides, "prototypes.k=1,2")
    assert outcome.status == 0, outcome.stderr
    assert outcome.stderr.count("not logged") == 1
    for job in ("0", "1"):
        for name in ("metrics.json", "DONE.json"):
            assert (sweep / job / name).is_file()

    training, job = read(tmp_path / "train"), read(sweep / "1")
    first, second = training.all("run")[0], job.all("run")[0]
    assert [first["job_type"], second["job_type"]] == ["train", "infer"]
    assert first["tags"] == second["tags"] == ["shapes", "efficientnet_lite0"]
    assert first["run_id"] != second["run_id"]
    assert "run_group" not in second  # no study
    assert {"val/map", "val/loss", "train/loss", "trainer/global_step"} <= training.history.keys()
    (artifact,) = training.artifacts.values()
    (checkpoint,) = tmp_path.glob("store/classifier/*/last.ckpt")
    assert artifact["name"] == f"classifier-{checkpoint.parent.name}"
    assert job.artifacts[artifact["name"]]["digest"] == artifact["digest"]

    assert job.config["prototypes/k"] == 2
    assert job.config["backbone"] == "efficientnet_lite0"
    assert (tmp_path / "store" / "features" / job.config["store/features"]).is_dir()
    metrics = json.loads((sweep / "1" / "metrics.json").read_text())
    assert job.history.items() >= metrics.items()
    kept = job.artifacts["prototypes"]["manifest"]["contents"][0]
    assert int(kept["size"]) == (sweep / "1" / "prototypes.safetensors").stat().st_size
    assert len([key for key in job.history if key.endswith("masks.lpcam.path")]) == 4
    _, rows = job.table("val/curve_table")
    assert len(rows) == 3 * 101
