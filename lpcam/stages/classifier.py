"""The stage that trains the host, on pictures or on their features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pytorch_lightning.callbacks import LearningRateMonitor

from lpcam.data.crops import RandomCrop, by_long_side
from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint, multi_hot
from lpcam.data.loaders import pooled_loader, train_loader
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer, fit
from lpcam.settings import CHECKED, Count
from lpcam.stages.features import features, read_features
from lpcam.storage.store import Stage


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Fitting:
    """How a host is trained, whichever it is.

    Attributes:
        epochs: Passes over the training split.
        validate_every: Epochs between validations; a checkpoint is written after each.
        batch_size: Pictures a step.
        long_side: Range in pixels that a picture's longer side is resized to; unused when frozen.
        crop: Side of the square crop in pixels; unused when frozen.
    """

    epochs: Count
    validate_every: Count
    batch_size: Count
    long_side: tuple[Count, Count] | None = None
    crop: Count | None = None


def classifier_stage(
    store: Path,
    dataset: SegmentationDataset,
    backbone: Backbone,
    settings: Mapping[str, Any],
    seed: int,
) -> Stage:
    """Where the trained host for these settings lies, or will lie: ``last.ckpt``."""
    inputs = {
        "backbone": backbone.fingerprint,
        "pictures": fingerprint(dataset.pictures(dataset.train_split)),
        "classes": dataset.classes,
        "settings": dict(settings),
        "seed": seed,
    }
    return Stage(store, "classifier", inputs)


def trained_checkpoint(stage: Stage, command: str) -> Path:
    """The checkpoint of a classifier stage.

    Args:
        stage: From :func:`classifier_stage`.
        command: What trains it, for the error message.

    Raises:
        InputError: It is not trained yet.
    """
    if not stage.done:
        raise InputError(f"no classifier for these settings; train it first:  {command}")
    return stage.folder / "last.ckpt"


def train(
    store: Path,
    stage: Stage,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    host: Host,
    fitting: Fitting,
    *,
    num_workers: int,
    logger: Any,
) -> dict[str, float]:
    """Train the host, going on from the last epoch of a killed run.

    One that is frozen trains on features, which are computed once.

    Args:
        store: The store's folder.
        stage: From :func:`classifier_stage`.
        make_trainer: Makes Lightning's trainer.
        dataset: The data.
        host: An untrained host.
        fitting: How it is trained.
        num_workers: Processes that decode pictures.
        logger: Lightning loggers.

    Returns:
        Metrics of the last epoch; empty when it was trained already.
    """
    with stage.build(resume=True) as folder:
        if folder is None:
            return {}
        if host.frozen:
            loaders = _feature_loaders(store, make_trainer, dataset, host, fitting, num_workers)
        else:
            loaders = _picture_loaders(dataset, host, fitting, num_workers)
        return fit(
            make_trainer,
            host,
            folder,
            *loaders,
            epochs=fitting.epochs,
            validate_every=fitting.validate_every,
            logger=logger,
            callbacks=(LearningRateMonitor("step"),) if logger else (),
        )


def _feature_loaders(
    store: Path,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    host: Host,
    fitting: Fitting,
    num_workers: int,
) -> list[Any]:
    """Mean features of both splits in batches."""

    def pooled(split: str, pictures: Sequence[Picture]) -> np.ndarray:
        local = split == dataset.prototype_split
        found = features(store, make_trainer, host, pictures, local=local, num_workers=num_workers)
        return np.stack([read_features(found, picture, "pooled") for picture in pictures])

    loaders: list[Any] = []
    for split in (dataset.train_split, dataset.val_split):
        pictures = dataset.pictures(split)
        labels = multi_hot(pictures, len(dataset.classes))
        loaders.append(
            pooled_loader(
                pooled(split, pictures),
                labels,
                batch_size=fitting.batch_size,
                shuffle=not loaders,
            )
        )
    return loaders


def _picture_loaders(
    dataset: SegmentationDataset, host: Host, fitting: Fitting, num_workers: int
) -> list[Any]:
    """Random crops of both splits in batches."""
    if fitting.long_side is None or fitting.crop is None:
        raise InputError("classifier.crop and classifier.long_side: needed to fine-tune")
    crop = RandomCrop(
        host.backbone.mean,
        host.backbone.std,
        scale=by_long_side(fitting.long_side),
        crop=fitting.crop,
    )
    loaders: list[Any] = []
    for split in (dataset.train_split, dataset.val_split):
        loaders.append(
            train_loader(
                dataset.pictures(split),
                len(dataset.classes),
                crop,
                batch_size=fitting.batch_size,
                shuffle=not loaders,
                num_workers=num_workers,
            )
        )
    return loaders
