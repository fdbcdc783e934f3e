"""A sweep's shared pass on a cluster: a job of its own, and the cluster lets the others wait."""

import os
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lpcam.sweeps.planner import Planned, plan


def plan_on_slurm(launcher: DictConfig, jobs: Sequence[Planned]) -> None:
    """Submit the shared pass as a job with the launcher's settings, which the others depend on.

    Args:
        launcher: The launcher's settings; the dependency is added to them.
        jobs: The jobs that are not done.
    """
    if len(jobs) < 2:
        return
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    settings: Any = OmegaConf.to_container(launcher, resolve=True)
    del settings["_target_"]
    executor = submitit.AutoExecutor(
        settings.pop("submitit_folder"),
        cluster="slurm",
        slurm_max_num_timeout=settings.pop("max_num_timeout"),
    )
    settings["name"] += "-shared"
    common = BaseQueueConf.__dataclass_fields__
    executor.update_parameters(
        **{key if key in common else f"slurm_{key}": value for key, value in settings.items()}
    )
    job = executor.submit(plan, jobs)
    print(f"Sweep: Slurm's job {job.job_id} makes what they share; they wait for it")
    given = launcher.additional_parameters.get("dependency")
    # However it ends: without it, each job computes for itself.
    after = ",".join(filter(None, (given, f"afterany:{job.job_id}")))
    with read_write(launcher), open_dict(launcher):
        launcher.additional_parameters.dependency = after


def submitted(launcher: DictConfig) -> set[str]:
    """The ids of the jobs that were submitted to Slurm for a sweep, for earlier tries too."""
    jobs = Path(launcher.submitit_folder).parent
    return {path.parent.name for path in jobs.glob("*/*_submitted.pkl")}


def wait_on_slurm(ids: Collection[str]) -> None:
    """Wait until jobs have ended: the launcher gives up at the first that was lost.

    Args:
        ids: Their ids.
    """
    # Not submitit's wait: the accounts that it asks do not tell of a job cancelled in the queue.
    command = ["squeue", "--noheader", f"--jobs={','.join(sorted(ids))}"]
    while ids and subprocess.run(command, capture_output=True, check=False).stdout:
        time.sleep(5)


def plan_on_ray(launcher: DictConfig, jobs: Sequence[Planned]) -> None:
    """Join the cluster as the launcher would, and wait for the shared pass there.

    Args:
        launcher: The launcher's settings.
        jobs: The jobs that are not done.
    """
    import ray

    settings: Any = OmegaConf.to_container(launcher.ray, resolve=True)
    # Ray's processes have the environment and the folder of `ray start`; Slurm's have ours, and the
    # jobs' configs name both.
    ours = {name: value for name, value in os.environ.items() if name.startswith("LPCAM_")}
    environment = settings["init"].pop("runtime_env", {})
    environment["env_vars"] = ours | environment.get("env_vars", {})
    here = os.getcwd()
    environment.setdefault("worker_process_setup_hook", lambda: os.chdir(here))
    ray.init(runtime_env=environment, **settings["init"])
    if len(jobs) > 1:
        ray.get(ray.remote(plan).options(**settings["remote"]).remote(jobs))
