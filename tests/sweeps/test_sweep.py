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
def own(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(trained, tmp_path / "own")
    return tmp_path / "own"


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


def sweep(program, own: Path, *overrides: str):
    folder = own / "sweep"
    arguments = (*TINY, *TINY_INFER, f"paths.root={own}", f"hydra.sweep.dir={folder}")
    return program("infer", "-m", *arguments, *overrides)


def jobs(own: Path) -> dict[str, dict]:
    """What DONE.json of every finished job holds, by the job's folder."""
    found = sorted((own / "sweep").glob("*/DONE.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def overrides_of(job: Path) -> dict[str, str]:
    import yaml

    lines = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
    return dict(line.split("=", 1) for line in lines)


def test_a_grid_takes_the_passes_of_one_and_gives_the_results_of_each_alone(
    program, own: Path, passes: list[str], tmp_path: Path
) -> None:
    assert sweep(program, own, *GRID).status == 0
    # 16 pictures for clustering, and each of 16 + 8 once at all scales.
    assert len(passes) == 16 + 24
    assert len(jobs(own)) == 4
    assert (own / "sweep" / "sweep.csv").read_text().count("\n") == 5

    for name in list(jobs(own))[:2]:
        job = own / "sweep" / name
        chosen = overrides_of(job)
        settings = [f"{key}={chosen[key]}" for key in ("prototypes.k", "thresholds.class_score")]
        fresh = tmp_path / name
        shutil.copytree(own, fresh, ignore=shutil.ignore_patterns("sweep", "maps", "views"))
        run = (*TINY, *TINY_INFER, *settings, "report=false", *at(fresh))
        assert program("infer", *run).status == 0
        alone = fresh / "run"
        assert json.loads((job / "metrics.json").read_text()) == json.loads(
            (alone / "metrics.json").read_text()
        )
        for path in (alone / "maps").iterdir():
            with np.load(path) as expected, np.load(job / "maps" / path.name) as found:
                np.testing.assert_allclose(found["maps"], expected["maps"], rtol=0, atol=1e-6)


def test_further_settings_need_no_pass(program, own: Path, passes: list[str]) -> None:
    sweep(program, own, *GRID)
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
        run = (*TINY, *TINY_INFER, override, "report=false", *at(own, f"run{place}"))
        outcome = program("infer", *run)
        assert outcome.status == 0, outcome.stderr
    assert passes == []


def test_features_over_the_limit_are_not_kept(program, own: Path, passes: list[str]) -> None:
    assert sweep(program, own, *GRID, "inference.keep_features=0").status == 0
    assert len(passes) == 16 + 24
    assert not (own / "store" / "views").exists()
    again = ("prototypes.use=context", "inference.keep_features=0", "report=false")
    assert program("infer", *TINY, *TINY_INFER, *again, *at(own)).status == 0
    assert len(passes) == 16 + 24 + 24


def test_a_finished_sweep_returns_at_once_and_an_axis_can_grow(program, own: Path) -> None:
    sweep(program, own, *GRID)
    times = {name: (own / "sweep" / name / "DONE.json").stat().st_mtime_ns for name in jobs(own)}
    before = jobs(own)
    outcome = sweep(program, own, *GRID, "prototypes.k=2,3,4")
    assert outcome.status == 0
    assert outcome.stdout.count("Already done") == 4
    after = jobs(own)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    for name, written in times.items():
        assert (own / "sweep" / name / "DONE.json").stat().st_mtime_ns == written


def test_a_failing_job_stops_no_other_and_is_named(program, own: Path) -> None:
    outcome = sweep(program, own, "prototypes.k=2,100000,3", "report=false")
    assert outcome.status == 1
    assert len(jobs(own)) == 2
    (failed,) = (own / "sweep").glob("*/FAILED.txt")
    assert "k=100000" in failed.read_text()
    assert f"failed: {failed.parent.name}" in outcome.stdout
    assert "k=100000" in outcome.stdout


def test_batches_go_on_after_a_failure(program, own: Path) -> None:
    batches = ("hydra.sweeper.max_batch_size=1", "report=false")
    assert sweep(program, own, "prototypes.k=100000,2", *batches).status == 1
    assert len(jobs(own)) == 1


def test_a_search_maximises_the_score(program, own: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("experiments=optuna_search", "hydra.sweeper.n_trials=3")
    outcome = sweep(program, own, *search, "thresholds.context_score=0.9")
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    found = OmegaConf.load(own / "sweep" / "optimization_results.yaml")
    assert set(found.best_params) == {"thresholds.class_score", "thresholds.context_floor"}
    scores = {}
    for name, job in jobs(own).items():
        chosen = overrides_of(own / "sweep" / name)
        values = tuple(float(chosen[key]) for key in found.best_params)
        scores[values] = job["metrics"]["val/lpcam/miou"]
    assert len(scores) == 3
    assert scores[tuple(found.best_params.values())] == found.best_value == max(scores.values())
    assert (own / "sweep" / "sweep.html").is_file()


def test_ranks_in_a_sweep_are_refused(program, own: Path) -> None:
    outcome = sweep(program, own, "prototypes.k=2,3", "trainer=ddp")
    assert outcome.status == 1
    assert "each rank would start the whole sweep again" in outcome.stdout


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_loses_and_repeats_nothing(program, own: Path) -> None:
    grid = ("prototypes.k=2,3", "thresholds.class_score=0.2,0.5,0.9", "report=false")
    command = [
        sys.executable, "infer.py", "-m", *TINY, *TINY_INFER, f"paths.root={own}",
        f"hydra.sweep.dir={own / 'sweep'}", *grid,
    ]  # fmt: skip
    for reached in ("store/maps/*.partial/*.npz", "sweep/*/DONE.json"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            deadline = time.monotonic() + 120
            while not list(own.glob(reached)):
                assert process.poll() is None, "the sweep ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    finished = jobs(own)
    assert 1 <= len(finished) < 6
    whole = {path: path.stat().st_mtime_ns for path in own.glob("store/*/*/manifest.json")}
    kept = {path: path.stat().st_mtime_ns for path in own.glob("sweep/*/DONE.json")}

    assert sweep(program, own, *grid).status == 0
    assert len(jobs(own)) == 6
    for path, written in {**whole, **kept}.items():
        assert path.stat().st_mtime_ns == written
    assert not list(own.glob("store/*/*.partial"))

    expected = jobs(own)
    shutil.rmtree(own / "sweep")
    shutil.rmtree(own / "store" / "maps")
    assert sweep(program, own, *grid).status == 0
    assert {n: j["metrics"] for n, j in jobs(own).items()} == {
        n: j["metrics"] for n, j in expected.items()
    }


@pytest.mark.slow
def test_launchers_give_the_same(program, own: Path, tmp_path: Path) -> None:
    """Jobs in this process, in joblib's processes and in submitit's, two at a time."""
    grid = ("prototypes.k=2,3", "report=false")
    found = {}
    for launcher in ("basic", "joblib", "submitit_local"):
        root = tmp_path / launcher
        shutil.copytree(own, root)
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
