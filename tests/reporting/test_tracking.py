"""How real offline runs start and end, read back with W&B's own reader of its run files."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from lpcam.reporting import tracking
from lpcam.reporting.wandb_content import log_results
from tests.conftest import TINY, TINY_INFER, at
from tests.reporting.wandb_runs import (
    CHOICES,
    CLASSES,
    METRICS,
    SCORES,
    Run,
    log_study,
    logged_out,
    logger,
    read,
    shown,
)


@pytest.fixture(autouse=True, scope="module")
def nobody_is_logged_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with logged_out(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return log_study(tmp_path_factory.mktemp("study"))


def test_each_job_of_a_process_is_a_run_of_its_own(study: list[Run]) -> None:
    ids = [run.all("run")[0]["run_id"] for run in study]
    assert len(set(ids)) == 3
    assert ids == [(run.folder.parents[1] / "wandb_id.txt").read_text() for run in study]
    assert [run.all("exit")[0]["exit_code"] for run in study] == [0, 0, 0]


def test_runs_of_a_study_are_found_by_group_and_told_apart_by_columns(study: list[Run]) -> None:
    for run, k in zip(study[1:], (4, 12), strict=True):
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


def test_the_best_epoch_is_the_summary_of_training(study: list[Run]) -> None:
    summary = {}
    for record in study[0].all("summary"):
        summary |= record["update"]
    assert summary["val/map"] == {"max": 0.9}


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


def test_a_run_of_a_sweeps_agent_has_the_id_that_the_agent_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "ab12cd34")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen01")
    assert run_id(tmp_path) == "chosen01"
    assert (tmp_path / "wandb_id.txt").read_text() == "chosen01"


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
        log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: not logged, results are not affected: ")

    with tracking.recording():
        log = tracking.start(logger(tmp_path / "good"), {}, {})
        log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
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
        log_results(
            log,
            metrics=METRICS,
            scores=SCORES,
            classes=CLASSES,
            shown=[shown(1)],
            made={"file": tmp_path / "file"},
        )
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("wandb/*run-*"))


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
