"""What Hydra does around a sweep of ``infer.py``: the shared pass before, the summary after."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lpcam.programs import entry

# Launchers whose jobs run where the sweep was started, so that a pass made here serves them.
LOCAL = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")
SLURM, RAY = "SlurmLauncher", "RayLauncher"


class SweepCallback(Callback):
    """Computes what the jobs share before they start, and compares them when all have ended.

    It changes no job: each finds its stages in the store, and would compute them itself were they
    not there. A failure in here costs time, never a result.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compute what the jobs share where they will run, if they are known already."""
        from lpcam.sweeps.clusters import plan_on_ray, plan_on_slurm, submitted
        from lpcam.sweeps.planner import pending, plan

        launcher = config.hydra.launcher
        name = launcher._target_.split(".")[-1]
        earlier: set[str] = submitted(launcher) if name == SLURM else set()
        entry.given_up = partial(self._given_up, config, earlier)
        jobs = [job for job in pending(grid(config)) if "segmenter" not in job[0]]
        if name in LOCAL:
            plan(jobs)
        elif name == SLURM:
            plan_on_slurm(launcher, jobs)
        elif name == RAY:
            plan_on_ray(launcher, jobs)

    def _given_up(self, config: DictConfig, earlier: set[str]) -> None:
        """Write the summary after the launcher failed, when no job runs any more.

        Jobs on Slurm go on without the process that started them, Ray's end with it.
        """
        from lpcam.sweeps.clusters import submitted, wait_on_slurm

        launcher = config.hydra.launcher
        if launcher._target_.endswith(SLURM):
            print("Sweep: waiting for the other jobs", file=sys.stderr)
            wait_on_slurm(submitted(launcher) - earlier)
        self.on_multirun_end(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.csv and sweep.html; end with status 1 if a job failed."""
        from lpcam.sweeps.jobs import FAILED
        from lpcam.sweeps.summary import summarise

        if summarise(Path(config.hydra.sweep.dir)).by_status(FAILED):
            sys.exit(1)


def grid(config: DictConfig) -> list[DictConfig]:
    """The configs of a sweep's jobs, each with Hydra's own part; empty unless it is a plain grid.

    Args:
        config: The sweep's config.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return []
    loader = GlobalHydra.instance().config_loader()
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(loader).parse_overrides([*swept, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [loader.load_sweep_config(config, overrides) for overrides in jobs]
