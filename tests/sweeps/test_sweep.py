"""Sweeps by the real command line, on a tiny drawn data set and a tiny classifier."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from lpcam.models.classifier import Classifier
from tests.conftest import ROOT, TINY, TINY_INFER, TINY_TRAIN, at

GRID = ("prototypes.k=2,3", "thresholds.class_score=0.2,0.9", "report=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "train.py", *TINY, *TINY_TRAIN, *at(root, "train")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    shutil.rmtree(root / "store" / "features")
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that went through the backbone for maps or features, as they go."""
    seen: list[str] = []
    real = Classifier.predict_step

    def count(self, batch, batch_idx):
        seen.extend(batch["ids"])
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "predict_step", count)
    return seen


def sweep(program, copied: Path, *overrides: str):
    folder = copied / "sweep"
    arguments = (*TINY, *TINY_INFER, f"paths.root={copied}", f"hydra.sweep.dir={folder}")
    return program("infer", "-m", *arguments, *overrides)


def jobs(copied: Path) -> dict[str, dict]:
    """What DONE.json of every finished job holds, by the job's folder."""
    found = sorted((copied / "sweep").glob("*/DONE.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def overrides_of(job: Path) -> dict[str, str]:
    import yaml

    lines = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
    return dict(line.split("=", 1) for line in lines)


def test_a_grid_takes_the_passes_of_one_and_gives_the_results_of_each_alone(
    program, copied: Path, passes: list[str], tmp_path: Path
) -> None:
    assert sweep(program, copied, *GRID).status == 0
    # 16 pictures for clustering, and each of 16 + 8 once at all scales.
    assert len(passes) == 16 + 24
    assert len(jobs(copied)) == 4
    assert (copied / "sweep" / "sweep.csv").read_text().count("\n") == 5

    for name in list(jobs(copied))[:2]:
        job = copied / "sweep" / name
        chosen = overrides_of(job)
        settings = [f"{key}={chosen[key]}" for key in ("prototypes.k", "thresholds.class_score")]
        fresh = tmp_path / name
        shutil.copytree(copied, fresh, ignore=shutil.ignore_patterns("sweep", "maps", "views"))
        run = (*TINY, *TINY_INFER, *settings, "report=false", *at(fresh))
        assert program("infer", *run).status == 0
        alone = fresh / "run"
        assert json.loads((job / "metrics.json").read_text()) == json.loads(
            (alone / "metrics.json").read_text()
        )
        for path in (alone / "maps").iterdir():
            with np.load(path) as expected, np.load(job / "maps" / path.name) as found:
                np.testing.assert_allclose(found["maps"], expected["maps"], rtol=0, atol=1e-6)


def test_further_settings_need_no_pass(program, copied: Path, passes: list[str]) -> None:
    sweep(program, copied, *GRID)
    passes.clear()
    for place, override in enumerate(
        (
            "thresholds.class_score=0.5",
            "thresholds.context_floor=null",
            "thresholds.seed_background=0.2",
            "prototypes.k=4",
            "thresholds.activation=0.5",
        )
    ):
        run = (*TINY, *TINY_INFER, override, "report=false", *at(copied, f"run{place}"))
        outcome = program("infer", *run)
        assert outcome.status == 0, outcome.stderr
    assert passes == []


def test_features_over_the_limit_are_not_kept(program, copied: Path, passes: list[str]) -> None:
    assert sweep(program, copied, *GRID, "inference.keep_features=0").status == 0
    assert len(passes) == 16 + 24
    assert not (copied / "store" / "views").exists()
    again = ("prototypes.use=context", "inference.keep_features=0", "report=false")
    assert program("infer", *TINY, *TINY_INFER, *again, *at(copied)).status == 0
    assert len(passes) == 16 + 24 + 24


def test_a_finished_sweep_returns_at_once_and_an_axis_can_grow(program, copied: Path) -> None:
    sweep(program, copied, *GRID)
    times = {
        name: (copied / "sweep" / name / "DONE.json").stat().st_mtime_ns for name in jobs(copied)
    }
    before = jobs(copied)
    outcome = sweep(program, copied, *GRID, "prototypes.k=2,3,4")
    assert outcome.status == 0
    assert outcome.stdout.count("Already done") == 4
    after = jobs(copied)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    for name, written in times.items():
        assert (copied / "sweep" / name / "DONE.json").stat().st_mtime_ns == written


def test_jobs_of_a_large_sweep_leave_files_of_the_shown_pictures(program, copied: Path) -> None:
    assert sweep(program, copied, *GRID, "save=shown").status == 0
    for name in jobs(copied):
        for kind, suffix in (("maps", "npz"), ("masks", "png")):
            assert len(list((copied / "sweep" / name / kind).glob(f"*.{suffix}"))) == 6 + 6
    assert (copied / "sweep" / "figures" / "gallery.png").is_file()
    name, done = min(jobs(copied).items())
    settings = (copied / "sweep" / name / ".hydra" / "overrides.yaml").read_text()
    again = [line.removeprefix("- ") for line in settings.splitlines()]
    again = [word for word in again if not word.startswith(("save=", "paths.root="))]
    assert program("infer", *again, *at(copied)).status == 0
    assert len(list((copied / "run" / "masks").glob("*.png"))) == 24
    for path in (copied / "sweep" / name / "masks").iterdir():
        assert path.read_bytes() == (copied / "run" / "masks" / path.name).read_bytes()
    assert json.loads((copied / "run" / "metrics.json").read_text()) == done["metrics"]


def test_a_failing_job_stops_no_other_and_is_named(program, copied: Path) -> None:
    outcome = sweep(program, copied, "prototypes.k=2,100000,3", "report=false")
    assert outcome.status == 1
    assert len(jobs(copied)) == 2
    (failed,) = (copied / "sweep").glob("*/FAILED.txt")
    assert "k=100000" in failed.read_text()
    assert f"failed: {failed.parent.name}" in outcome.stdout
    assert "k=100000" in outcome.stdout


def test_batches_go_on_after_a_failure(program, copied: Path) -> None:
    batches = ("hydra.sweeper.max_batch_size=1", "report=false")
    assert sweep(program, copied, "prototypes.k=100000,2", *batches).status == 1
    assert len(jobs(copied)) == 1


def test_a_search_maximises_the_score(program, copied: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("experiments=optuna_search", "hydra.sweeper.n_trials=3")
    outcome = sweep(program, copied, *search, "thresholds.context_score=0.9")
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    found = OmegaConf.load(copied / "sweep" / "optimization_results.yaml")
    assert set(found.best_params) == {"thresholds.class_score", "thresholds.context_floor"}
    scores = {}
    for name, job in jobs(copied).items():
        chosen = overrides_of(copied / "sweep" / name)
        values = tuple(float(chosen[key]) for key in found.best_params)
        scores[values] = job["metrics"]["val/lpcam/miou"]
    assert len(scores) == 3
    assert scores[tuple(found.best_params.values())] == found.best_value == max(scores.values())
    assert (copied / "sweep" / "sweep.html").is_file()


def test_ranks_in_a_sweep_are_refused(program, copied: Path) -> None:
    outcome = sweep(program, copied, "prototypes.k=2,3", "trainer=ddp")
    assert outcome.status == 1
    assert "each rank would start the whole sweep again" in outcome.stdout


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_loses_and_repeats_nothing(program, copied: Path) -> None:
    grid = ("prototypes.k=2,3", "thresholds.class_score=0.2,0.5,0.9", "report=false")
    command = [
        sys.executable, "infer.py", "-m", *TINY, *TINY_INFER, f"paths.root={copied}",
        f"hydra.sweep.dir={copied / 'sweep'}", *grid,
    ]  # fmt: skip
    for reached in ("store/maps/*.partial/*.index", "sweep/*/DONE.json"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            deadline = time.monotonic() + 120
            while not list(copied.glob(reached)):
                assert process.poll() is None, "the sweep ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    finished = jobs(copied)
    assert 1 <= len(finished) < 6
    whole = {path: path.stat().st_mtime_ns for path in copied.glob("store/*/*/manifest.json")}
    kept = {path: path.stat().st_mtime_ns for path in copied.glob("sweep/*/DONE.json")}

    assert sweep(program, copied, *grid).status == 0
    assert len(jobs(copied)) == 6
    for path, written in {**whole, **kept}.items():
        assert path.stat().st_mtime_ns == written
    assert not list(copied.glob("store/*/*.partial"))

    expected = jobs(copied)
    shutil.rmtree(copied / "sweep")
    shutil.rmtree(copied / "store" / "maps")
    assert sweep(program, copied, *grid).status == 0
    assert {n: j["metrics"] for n, j in jobs(copied).items()} == {
        n: j["metrics"] for n, j in expected.items()
    }


@pytest.mark.slow
def test_launchers_give_the_same(program, copied: Path, tmp_path: Path) -> None:
    """Jobs in this process, in joblib's processes and in submitit's, two at a time."""
    grid = ("prototypes.k=2,3", "report=false")
    found = {}
    for launcher in ("basic", "joblib", "submitit_local"):
        root = tmp_path / launcher
        shutil.copytree(copied, root)
        options = [f"hydra/launcher={launcher}"]
        if launcher == "submitit_local":
            options.append("hydra.sweeper.max_batch_size=2")
        if launcher == "joblib":
            options += ["hydra.launcher.n_jobs=2", "num_workers=1"]
        command = [
            sys.executable, "infer.py", "-m", *TINY, *TINY_INFER, f"paths.root={root}",
            f"hydra.sweep.dir={root / 'sweep'}", *grid, *options,
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found[launcher] = {
            overrides_of(root / "sweep" / name)["prototypes.k"]: job["metrics"]
            for name, job in jobs(root).items()
        }
    assert len(found["basic"]) == 2
    assert found["basic"] == found["joblib"] == found["submitit_local"]
