"""Data set and host of a config, before and after training."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pydantic
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from lpcam.data.dataset import SegmentationDataset
from lpcam.errors import InputError
from lpcam.models.backbones import build_backbone
from lpcam.models.host import Host, load_host
from lpcam.models.training import MakeTrainer
from lpcam.programs.build import build, settings
from lpcam.programs.done import inputs_digest
from lpcam.programs.entry import command_line
from lpcam.programs.folders import CONF
from lpcam.prototypes.centers import Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.selection import Selection
from lpcam.settings import CHECKED, Text, make
from lpcam.stages.batches import Fitting
from lpcam.stages.classifier import classifier_stage, train, trained_checkpoint
from lpcam.stages.maps import Inference
from lpcam.stages.seeds import Seeding, seeds
from lpcam.storage.ranks import agree
from lpcam.storage.store import Stage

# What a host's config holds that is not for the host itself: what it begins with, what its seeds
# are made with, and where LPCAM is plugged in.
AROUND = ("base", "seeds", "lpcam")
# Overrides of infer.py that train.py needs too, to train the classifier that is looked for.
SHARED = (
    "dataset",
    "backbone",
    "classifier",
    "trainer",
    "paths",
    "seed",
    "recipe",
    "experiments",
)


@dataclass(frozen=True)
class Setup:
    """What a classifier is trained with.

    Attributes:
        dataset: The data.
        host: The host, not yet trained.
        fitting: How it is trained.
        stage: Where it lies in the store once it is.
        base: The host that this one begins with, if it does.
        seeding: How the base's maps become seeds, if this one learns from seeds.
    """

    dataset: SegmentationDataset
    host: Host
    fitting: Fitting
    stage: Stage
    base: "Setup | None" = None
    seeding: Seeding | None = None


@dataclass(frozen=True)
class Trained:
    """A trained host, and what it was trained on.

    Attributes:
        dataset: The data.
        host: The trained host.
        checkpoint: Its file.
        stage: Its stage in the store; None if a checkpoint was given.
        base: The trained host that makes the seeds, if there are any.
        seeding: How.
    """

    dataset: SegmentationDataset
    host: Host
    checkpoint: Path
    stage: Stage | None
    base: Host | None = None
    seeding: Seeding | None = None


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
    return _set_up(cfg, cfg.classifier, build(cfg.dataset))


def _set_up(cfg: DictConfig, node: DictConfig, dataset: SegmentationDataset) -> Setup:
    """What a host's config node describes, and what its ``base`` does."""
    base = _set_up(cfg, node.base, dataset) if "base" in node else None
    seeding = _seeding(node) if "seeds" in node else None
    fitting = settings(Fitting, node)
    network = settings(Network, cfg.backbone)
    pl.seed_everything(cfg.seed, verbose=False)
    backbone = build_backbone(network.name, network.weights, network.options)
    around = {known.name for known in fields(Fitting)} | set(AROUND)
    host: Host = build(node, backbone, len(dataset.classes), without=around)
    host.precision = precision = str(cfg.trainer.precision)
    dataset.prepare()  # after every value is checked, for it may take minutes
    described: Any = OmegaConf.to_container(node, resolve=True)
    described = {name: value for name, value in described.items() if name not in AROUND}
    if seeding:
        described["seeds"] = seeding.inputs
    stage = classifier_stage(
        Path(cfg.paths.store),
        dataset,
        backbone,
        described,
        seed=cfg.seed,
        precision=precision,
        base=base.stage if base else None,
    )
    return Setup(dataset, host, fitting, stage, base, seeding)


def _seeding(node: DictConfig) -> Seeding:
    """How seeds are made: LPCAM is plugged in before (``upstream``) or into the host itself."""
    source = {"inplace": "cam", "upstream": "lpcam"}.get(node.lpcam)
    if source is None:
        raise InputError(f"classifier.lpcam={node.lpcam}: choose inplace or upstream")
    parts = {
        "source": source,
        "clustering": settings(Clustering, node.seeds.prototypes, node.seeds.thresholds),
        "draw": settings(Draw, node.seeds.prototypes),
        "selection": settings(Selection, node.seeds.thresholds, node.seeds.prototypes),
        "inference": settings(Inference, node.seeds.inference),
    }
    return make(
        Seeding,
        {**parts, "labels": node.seeds.labels, "scores": node.seeds.scores},
        "classifier.seeds.{}".format,
    )


def train_base(
    setup: Setup, store: Path, make_trainer: MakeTrainer, *, seed: int, num_workers: int | None
) -> None:
    """Train what a host begins with, unless that is done, and let it begin.

    Args:
        setup: The host.
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        seed: Of everything random.
        num_workers: Processes that decode pictures.
    """
    base = setup.base
    if base is None or agree(setup.stage.done):
        return
    train_base(base, store, make_trainer, seed=seed, num_workers=num_workers)
    train(
        store, base.stage, make_trainer, setup.dataset, base.host, base.fitting,
        num_workers=num_workers, logger=None,
    )  # fmt: skip
    setup.host.begin(load_host(base.stage.folder / "last.ckpt", base.host))
    splits = (setup.dataset.train_split,)
    give_seeds(setup, splits, store, make_trainer, num_workers=num_workers)
    # As if nothing had been drawn before: the same, whether the base was there or not.
    pl.seed_everything(seed, verbose=False)


def give_seeds(
    found: Setup | Trained,
    splits: Sequence[str],
    store: Path,
    make_trainer: MakeTrainer,
    *,
    num_workers: int | None,
) -> None:
    """Make the seeds of some splits with a trained base, where the host needs them.

    Args:
        found: The host.
        splits: The splits.
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        num_workers: Processes that decode pictures.
    """
    base = found.base.host if isinstance(found.base, Setup) else found.base
    if not found.seeding or not base:
        return
    stages = seeds(
        store, make_trainer, base, found.dataset, splits, found.seeding, num_workers=num_workers
    )
    found.host.seeds = {
        picture.id: stage.folder / f"{picture.id}.png"
        for split, stage in stages.items()
        for picture in found.dataset.pictures(split)
    }
    # Those of other splits are made in the same way.
    found.host.seeds_key = stages[found.dataset.train_split].key


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
    command = command_line("train", _without_sweeps(overrides), SHARED)
    return _trained(OmegaConf.to_yaml(described), command)


def _without_sweeps(overrides: Sequence[str]) -> list[str]:
    """Overrides without the studies that sweep, since train.py lacks what most of them vary."""
    kept = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "experiments":
            files = [CONF.parent / "experiments" / f"{n}.yaml" for n in re.findall(r"\w+", value)]
            fixed = [f.stem for f in files if f.is_file() and "sweeper:" not in f.read_text()]
            if fixed:
                kept.append(f"{key}=[{','.join(fixed)}]")
        else:
            kept.append(override)
    return kept


@functools.lru_cache(maxsize=1)
def _trained(text: str, train_command: str) -> Trained:
    cfg: Any = OmegaConf.create(text)
    setup = set_up(cfg)
    stage, checkpoint = None, cfg.ckpt
    if checkpoint is None:
        stage, checkpoint = setup.stage, trained_checkpoint(setup.stage, train_command)
    path = Path(checkpoint).expanduser()
    base = None
    if setup.base and setup.seeding:
        base = load_host(trained_checkpoint(setup.base.stage, train_command), setup.base.host)
    host = load_host(path, setup.host)
    return Trained(setup.dataset, host, path, stage, base, setup.seeding)
