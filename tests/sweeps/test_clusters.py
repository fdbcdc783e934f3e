"""What is submitted to clusters, with stand-ins for Slurm's commands and for Ray."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from lpcam.sweeps import clusters
from lpcam.sweeps.clusters import plan_on_ray, plan_on_slurm, wait_on_slurm
from tests.conftest import ROOT, TINY, TINY_INFER
from tests.sweeps.test_sweep import copied, jobs, passes, sweep, trained

__all__ = ["copied", "passes", "trained"]  # fixtures

submitit = pytest.importorskip("submitit")
GRID = ("prototypes.k=2,3", "report=false")
SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=small")
COMMANDS = {
    "srun": "",
    # Keeps what it is given, and starts nothing.
    "sbatch": 'n=$(($(ls "$0".* | wc -l) + 1)); cp "$1" "$0.$n"; echo Submitted batch job $n',
    "sacct": 'echo "JobID|State|NodeList"; for i in 1 2 3; do for j in 0 1; do '
    'echo "${i}_$j|CANCELLED by 0|"; done; done',
    "squeue": "",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Slurm's commands, and what ``sbatch`` was given as ``sbatch.1`` and so on."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, line in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    submitit.SlurmJob.watcher.clear()
    return folder


def given(slurm: Path, option: str) -> list[str | None]:
    """The value of an option in each submission."""
    found: list[str | None] = []
    for path in sorted(slurm.glob("sbatch.*")):
        lines = [line for line in path.read_text().splitlines() if f"--{option}=" in line]
        found.append(lines[0].partition("=")[2] if lines else None)
    return found


def test_the_shared_pass_is_a_job_that_the_others_wait_for(
    program, copied: Path, passes: list[str], slurm: Path
) -> None:
    outcome = sweep(program, copied, *GRID, *SLURM)
    assert given(slurm, "dependency") == [None, "afterany:1"]
    assert given(slurm, "array") == [None, "0-1%2"]
    assert given(slurm, "partition") == ["small", "small"]
    # All were cancelled: a line and the summary, no traceback.
    assert outcome.status == 1
    assert "state: CANCELLED by 0" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "0 of 2 jobs done, 2 missing." in " ".join(outcome.stdout.split())

    submitit.core.utils.DelayedSubmission.load(
        copied / "sweep" / ".submitit" / "1" / "1_submitted.pkl"
    ).result()
    assert len(passes) == 16 + 24
    assert sweep(program, copied, *GRID).status == 0
    assert len(passes) == 16 + 24
    assert len(jobs(copied)) == 2

    sweep(program, copied, *GRID, *SLURM)
    assert given(slurm, "dependency")[2:] == [None]  # nothing is left to share


def test_a_dependency_that_was_given_is_kept(slurm: Path, tmp_path: Path) -> None:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    launcher = OmegaConf.structured(SlurmQueueConf)
    launcher.submitit_folder = f"{tmp_path}/%j"
    launcher.name = "infer"
    launcher.additional_parameters = {"dependency": "singleton"}
    OmegaConf.set_readonly(launcher, True)
    nothing: Any = [(OmegaConf.create(), [])] * 2
    plan_on_slurm(launcher, nothing)
    assert given(slurm, "dependency") == ["singleton"]
    assert launcher.additional_parameters.dependency == "singleton,afterany:1"


def test_jobs_that_run_are_waited_for(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def end(seconds: float) -> None:
        naps.append(seconds)
        (slurm / "squeue").write_text("#!/bin/sh\n")

    monkeypatch.setattr(clusters.time, "sleep", end)
    (slurm / "squeue").write_text('#!/bin/sh\n[ "$2" = --jobs=3_0,3_1 ] && echo running\n')
    wait_on_slurm({"3_1", "3_0"})
    assert len(naps) == 1
    wait_on_slurm(set())


def test_rays_processes_get_our_folder_and_our_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: dict[str, Any] = {}

    def remote(function: Any) -> Any:
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(
                remote=lambda jobs: calls.update(function=function, options=options, jobs=jobs)
            )
        )

    fake = SimpleNamespace(init=calls.update, remote=remote, get=lambda reference: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("LPCAM_SWEEP", "sweep-0")
    monkeypatch.chdir(tmp_path)
    settings = {
        "init": {"address": "auto", "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        "remote": {"num_cpus": 2},
    }
    jobs: Any = [("a", []), ("b", [])]
    plan_on_ray(OmegaConf.create({"ray": settings}), jobs)
    assert calls["address"] == "auto"
    assert {"OMP_NUM_THREADS", "LPCAM_SWEEP"} <= set(calls["runtime_env"]["env_vars"])
    assert calls["options"] == {"num_cpus": 2}
    assert calls["jobs"] == jobs
    os.chdir("/")
    calls["runtime_env"]["worker_process_setup_hook"]()
    assert Path.cwd() == tmp_path


@pytest.mark.long
def test_a_real_slurm_gives_what_this_process_gives(program, copied: Path, tmp_path: Path) -> None:
    try:
        subprocess.run(["sinfo"], capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no Slurm answers: sh experiments/cluster/slurm.sh start")
    root = tmp_path / "slurm"
    shutil.copytree(copied, root)
    command = [
        sys.executable, "infer.py", "-m", *TINY, *TINY_INFER, f"paths.root={root}",
        f"hydra.sweep.dir={root / 'sweep'}", *GRID, "hydra/launcher=submitit_slurm",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweep(program, copied, *GRID).status == 0
    assert sorted(str(job["metrics"]) for job in jobs(root).values()) == sorted(
        str(job["metrics"]) for job in jobs(copied).values()
    )
