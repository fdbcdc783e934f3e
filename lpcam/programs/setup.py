"""Data set and host of a config, before and after training."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pydantic
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from lpcam.data.dataset import SegmentationDataset
from lpcam.models.backbones import build_backbone
from lpcam.models.host import Host, load_host
from lpcam.programs.build import build, settings
from lpcam.programs.done import inputs_digest
from lpcam.programs.entry import command_line
from lpcam.settings import CHECKED, Text
from lpcam.stages.classifier import Fitting, classifier_stage, trained_checkpoint
from lpcam.storage.store import Stage

# Overrides of infer.py that train.py needs too, to train the classifier that is looked for.
SHARED = ("dataset", "backbone", "classifier", "paths", "seed", "recipe", "experiments")


@dataclass(frozen=True)
class Setup:
    """What a classifier is trained with.

    Attributes:
        dataset: The data.
        host: The host, not yet trained.
        fitting: How it is trained.
        stage: Where it lies in the store once it is.
    """

    dataset: SegmentationDataset
    host: Host
    fitting: Fitting
    stage: Stage


@dataclass(frozen=True)
class Trained:
    """A trained host, and what it was trained on.

    Attributes:
        dataset: The data.
        host: The trained host.
        checkpoint: Its file.
        stage: Its stage in the store; None if a checkpoint was given.
    """

    dataset: SegmentationDataset
    host: Host
    checkpoint: Path
    stage: Stage | None


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Network:
    """Which backbone.

    Attributes:
        name: See :func:`~lpcam.models.backbones.build_backbone`.
        weights: Likewise.
        options: Likewise.
    """

    name: Text
    weights: Text | None = None
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def set_up(cfg: DictConfig) -> Setup:
    """Build what a config describes; nothing is trained, but data may be generated.

    Raises:
        InputError: A setting is wrong, or data is missing.
    """
    dataset: SegmentationDataset = build(cfg.dataset)
    fitting = settings(Fitting, cfg.classifier)
    network = settings(Network, cfg.backbone)
    pl.seed_everything(cfg.seed, verbose=False)
    backbone = build_backbone(network.name, network.weights, network.options)
    shared = {known.name for known in fields(Fitting)}
    host: Host = build(cfg.classifier, backbone, len(dataset.classes), without=shared)
    host.precision = precision = str(cfg.trainer.precision)
    dataset.prepare()  # after every value is checked, for it may take minutes
    described: Any = OmegaConf.to_container(cfg.classifier)
    stage = classifier_stage(
        Path(cfg.paths.store), dataset, backbone, described, seed=cfg.seed, precision=precision
    )
    return Setup(dataset, host, fitting, stage)


def trained(cfg: DictConfig, overrides: Sequence[str]) -> Trained:
    """The trained host of a config. The jobs of a sweep in one process share it.

    Args:
        cfg: A job's config.
        overrides: What was changed in it, for messages.

    Raises:
        InputError: Data or classifier are missing, or do not fit.
    """
    names = ["dataset", "backbone", "classifier", "ckpt", "seed", "paths"]
    described: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, names), resolve=True)
    described["trainer"] = {"precision": cfg.trainer.precision}
    del described["paths"]["output"]  # differs between the jobs of a sweep
    described["inputs"] = inputs_digest(described)
    return _trained(OmegaConf.to_yaml(described), command_line("train", overrides, SHARED))


@functools.lru_cache(maxsize=1)
def _trained(text: str, train_command: str) -> Trained:
    cfg: Any = OmegaConf.create(text)
    setup = set_up(cfg)
    stage, checkpoint = None, cfg.ckpt
    if checkpoint is None:
        stage, checkpoint = setup.stage, trained_checkpoint(setup.stage, train_command)
    path = Path(checkpoint).expanduser()
    return Trained(setup.dataset, load_host(path, setup.host), path, stage)
