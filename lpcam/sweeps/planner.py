"""One pass for a grid: what the jobs of a sweep share is computed once, before they start."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lpcam.programs.done import done_metrics
from lpcam.programs.entry import USER_ERRORS
from lpcam.programs.run import Run
from lpcam.stages.scores import scores


def plan(configs: Sequence[DictConfig]) -> None:
    """Compute features, centres, maps and scores of all jobs that are not done.

    Jobs on the same pictures with the same classifier get their maps from one pass over the
    pictures, whatever their prototypes. A job whose settings are wrong is left to fail by itself.

    Args:
        configs: The jobs' configs, with Hydra's own part.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for config in configs:
        try:
            run = _open(config)
            if run is not None:
                run.settings  # noqa: B018 - clusters now
                groups[run.sharing].append(run)
        except USER_ERRORS:
            continue
    todo = sum(map(len, groups.values()))
    print(f"Sweep: {len(configs)} jobs, {todo} to do, {len(groups)} passes over the pictures")
    for runs in groups.values():
        settings = {
            f"{place}/{name}": setting
            for place, run in enumerate(runs)
            for name, setting in run.settings.items()
        }
        maps = runs[0].maps(settings)
        scores(runs[0].store, maps, runs[0].dataset)


def _open(config: DictConfig) -> Run | None:
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
        OmegaConf.resolve(config)
    finally:
        HydraConfig.instance().cfg = before
    plain: Any = OmegaConf.to_container(config)
    if done_metrics(folder, plain) is not None:
        return None
    return Run(config, overrides)
