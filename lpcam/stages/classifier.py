"""The stage that trains the host, on pictures or on their features."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from PIL import Image
from pydantic import Field
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor

from lpcam.data.crops import RandomCrop, by_long_side
from lpcam.data.dataset import SegmentationDataset, fingerprint, multi_hot
from lpcam.data.loaders import pooled_loader, train_loader
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer, fit, per_process
from lpcam.settings import CHECKED, Count, Pair
from lpcam.stages.features import FeatureLimit, features, read_features
from lpcam.stages.passes import feature_bytes
from lpcam.storage.arrays import stored
from lpcam.storage.files import write_json
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import is_main_process
from lpcam.storage.store import Stage, results

Side = Annotated[int, Field(ge=1, le=8192)]


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
    long_side: Pair[Side] | None = None
    crop: Side | None = None


def classifier_stage(
    store: Path,
    dataset: SegmentationDataset,
    backbone: Backbone,
    settings: Mapping[str, Any],
    *,
    seed: int,
    precision: str,
) -> Stage:
    """Where the trained host for these settings lies, or will lie.

    It holds ``last.ckpt`` and ``metrics.json``, those of the last epoch.
    """
    inputs = {
        "backbone": backbone.fingerprint,
        "precision": precision,
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
        why = ""
        if other := _on_other_pictures(stage):
            why = (
                ": the pictures are others than in its training, or were touched (the size or the "
                f"time of a file differs); if they show the same give ckpt={other}"
            )
        raise InputError(f"no classifier for these settings{why}; train it first:  {command}")
    return stage.folder / "last.ckpt"


def _on_other_pictures(stage: Stage) -> Path | None:
    """The checkpoint of a classifier that differs in nothing but the files of its pictures."""
    wanted = digest({**stage.inputs, "pictures": None})
    found = [
        result
        for result in results(stage.folder.parents[1], stage.name)
        if digest({**result["inputs"], "pictures": None}) == wanted
    ]
    newest = min(found, key=lambda result: float(result["age"]), default=None)
    return newest["folder"] / "last.ckpt" if newest else None


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
        Metrics of the last epoch.
    """
    with stage.build(resume=True, together=True) as folder:
        if folder is None:
            return trained_metrics(stage)
        make_loaders = partial(_picture_loaders, dataset, host, fitting, num_workers)
        if host.frozen:
            pooled = _pooled(store, make_trainer, dataset, host, num_workers)
            make_loaders = partial(_feature_loaders, pooled, fitting)
        metrics = fit(
            make_trainer,
            host,
            folder,
            make_loaders,
            epochs=fitting.epochs,
            validate_every=fitting.validate_every,
            logger=logger,
            callbacks=(LearningRateMonitor("step"),) if logger else (),
        )
        if is_main_process():
            write_json(folder / "metrics.json", metrics)
        return metrics


def trained_metrics(stage: Stage) -> dict[str, float]:
    """Metrics of the last epoch of a host that is trained."""
    with stored(stage.folder / "metrics.json") as path:
        metrics: dict[str, float] = json.loads(path.read_text())
    return metrics


def _pooled(
    store: Path,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    host: Host,
    num_workers: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean features and labels of the training and the validation split."""
    found = []
    for split in (dataset.train_split, dataset.val_split):
        pictures = dataset.pictures(split)
        # Local features for prototypes come of the same pass, if the store is to hold so many.
        local = (
            split == dataset.prototype_split
            and feature_bytes(host, pictures, [1.0]) <= FeatureLimit().max_features * 1e9
        )
        stage = features(store, make_trainer, host, pictures, local=local, num_workers=num_workers)
        pooled = np.stack([read_features(stage, picture, "pooled") for picture in pictures])
        found.append((pooled, multi_hot(pictures, len(dataset.classes))))
    return found


def _feature_loaders(
    pooled: Sequence[tuple[np.ndarray, np.ndarray]], fitting: Fitting, processes: int
) -> tuple[Any, Any]:
    """Mean features of both splits in batches."""
    size = per_process(fitting.batch_size, processes, "classifier.batch_size")
    train, val = pooled
    return (
        pooled_loader(*train, batch_size=size),
        pooled_loader(*val, batch_size=size, shuffle=False),
    )


def _picture_loaders(
    dataset: SegmentationDataset, host: Host, fitting: Fitting, num_workers: int, processes: int
) -> tuple[Any, Any]:
    """Crops of both splits in batches: random ones to learn from, whole pictures to validate on."""
    if fitting.long_side is None or fitting.crop is None:
        raise InputError("classifier.crop and classifier.long_side: needed to fine-tune")
    crop = RandomCrop(
        host.backbone.mean,
        host.backbone.std,
        scale=by_long_side(fitting.long_side),
        crop=fitting.crop,
    )
    size = per_process(fitting.batch_size, processes, "classifier.batch_size")

    def loader(split: str, transform: Callable[[Image.Image], Tensor], *, shuffle: bool) -> Any:
        return train_loader(
            dataset.pictures(split),
            len(dataset.classes),
            transform,
            batch_size=size,
            shuffle=shuffle,
            num_workers=num_workers,
        )

    return (
        loader(dataset.train_split, crop, shuffle=True),
        loader(dataset.val_split, crop.whole, shuffle=False),
    )
