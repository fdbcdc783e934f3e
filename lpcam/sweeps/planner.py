"""One pass for a grid: what the jobs of a sweep share is computed once, before they start."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lpcam.programs.done import done_metrics
from lpcam.programs.entry import USER_ERRORS
from lpcam.programs.options import for_task
from lpcam.programs.run import Run
from lpcam.stages.scores import scores

# A job's config as it will see it, and its overrides: plain values, which another process needs
# nothing of Hydra's to read.
Planned = tuple[DictConfig, list[str]]
FILES = 2**16  # that a plan may have open


def pending(configs: Sequence[DictConfig]) -> list[Planned]:
    """The jobs that are not done.

    Args:
        configs: The jobs' configs, with Hydra's own part.
    """
    found = []
    for config in configs:
        try:
            job = _open(config)
        except USER_ERRORS:
            continue
        if job is not None:
            found.append(job)
    print(f"Sweep: {len(configs)} jobs, {len(found)} to do")
    return found


def plan(jobs: Sequence[Planned]) -> None:
    """Compute features, centres, maps, scores and background scores of jobs.

    Jobs on the same pictures with the same classifier get their maps from one pass over the
    pictures, whatever their prototypes. A job whose settings are wrong is left to fail by itself.

    Args:
        jobs: The jobs that are not done.
    """
    _allow_files()
    groups: dict[str, list[Run]] = defaultdict(list)
    for config, overrides in jobs:
        try:
            run = Run(config, overrides)
            run.settings  # noqa: B018 - clusters now
            groups[run.sharing].append(run)
        except USER_ERRORS:
            continue
    print(f"Sweep: passes over the pictures for {len(jobs)} jobs: {len(groups)}")
    for runs in groups.values():
        settings = {
            f"{place}/{name}": setting
            for place, run in enumerate(runs)
            for name, setting in run.settings.items()
        }
        maps = runs[0].maps(settings)
        scores(runs[0].store, maps, runs[0].dataset)
        for run in runs:
            if run.choice.seed_background == "auto":
                run.backgrounds(maps)  # of all: each picture is opened once for them
                break


def _allow_files() -> None:
    """Let this process have many files open: the lock of each setting's maps is one."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which knows no such limit
        return
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if few != resource.RLIM_INFINITY and few < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _open(config: DictConfig) -> Planned | None:
    """A job as it will see itself; None if it is done."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)
        overrides = list(config.hydra.overrides.task)
        with open_dict(config):
            del config.hydra
        config.paths.output = str(folder)
        config.logger = None
        config = for_task(config)
        OmegaConf.resolve(config)
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        # As Hydra will: so the summary counts a job that never begins.
        OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    finally:
        HydraConfig.instance().cfg = before
    plain: Any = OmegaConf.to_container(config)
    if done_metrics(folder, plain) is not None:
        return None
    return config, overrides
