"""The options that stand at the top of a config, and those that say where files go.

Imports nothing heavy: they are checked before anything else is done.
"""

from typing import Annotated, Literal

import pydantic
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from lpcam.programs.build import settings
from lpcam.settings import CHECKED, Names, Seed, Text

# What a segmentation network has no part in; a task of Hydra's could not leave out all of it.
MAKING_MAPS = ("classifier", "maps", "prototypes", "thresholds", "inference", "refiner")


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Options:
    """What every program may have.

    Attributes:
        data: Folder of generated data sets.
        store: Folder of the store.
        output: The run's folder.
        map_splits: Splits that get maps.
        seed: Of everything random, the data and the clusters excepted.
        num_workers: Processes that decode pictures; None for as many as the machine has use for.
        ckpt: A classifier's checkpoint, or the file of a segmentation network.
        localisation: Score maps as localisation too.
        instances: Tell the objects of a class apart, with displacements that a refiner learns.
        masks: What a segmentation network learns from.
        report: Write the report; None for not in a sweep.
        save: Whose maps and masks the run's folder gets.
        shown_pictures: Ids of pictures to show in every run.
    """

    data: Text
    store: Text
    output: Text
    map_splits: Names
    seed: Seed = 0
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = None
    ckpt: Text | None = None
    localisation: bool = False
    instances: bool = False
    masks: Text | None = None
    report: bool | None = None
    save: Literal["all", "shown"] = "all"
    shown_pictures: Names | None = None


def options(cfg: DictConfig) -> Options:
    """The checked options of a config.

    Raises:
        InputError: One is wrong.
    """
    # The seeds of groups are theirs: the first node that has a name gives its value.
    return settings(Options, cfg, cfg.paths, cfg.dataset)


def for_task(cfg: DictConfig) -> DictConfig:
    """A config without the groups that its task has no part in."""
    if "segmenter" not in cfg:
        return cfg
    return OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name not in MAKING_MAPS])
