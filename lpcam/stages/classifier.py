"""The stage that trains the classifier, on pictures or on their features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

from lpcam.models.backbones import Backbone
from lpcam.models.classifier import Classifier
from lpcam.data.dataset import SegmentationDataset, fingerprint, multi_hot
from lpcam.data.loaders import pooled_loader, train_loader
from lpcam.data.transforms import TrainTransform
from lpcam.errors import InputError
from lpcam.stages.passes import MakeTrainer
from lpcam.stages.features import features, read_features
from lpcam.storage.store import Stage


def classifier_stage(
    store: Path,
    dataset: SegmentationDataset,
    backbone: Backbone,
    settings: Mapping[str, Any],
    seed: int,
) -> Stage:
    """Where the classifier for these settings lies, or will lie: ``last.ckpt``."""
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
    classifier: Classifier,
    *,
    epochs: int,
    validate_every: int,
    batch_size: int,
    long_side: tuple[int, int] | None,
    crop: int | None,
    num_workers: int,
    logger: Any,
) -> dict[str, float]:
    """Train the classifier, going on from the last epoch of a killed run.

    With a frozen backbone its features are computed once and only the head is trained on them.

    Args:
        store: The store's folder.
        stage: From :func:`classifier_stage`.
        make_trainer: Makes Lightning's trainer.
        dataset: The data.
        classifier: An untrained classifier.
        epochs: Passes over the training split.
        validate_every: Epochs between validations; a checkpoint is written after each.
        batch_size: Pictures a step.
        long_side: See :class:`~lpcam.data.transforms.TrainTransform`; unused when frozen.
        crop: Likewise.
        num_workers: Processes that decode pictures.
        logger: Lightning loggers.

    Returns:
        Metrics of the last epoch; empty when the classifier was there already.
    """
    with stage.build(resume=True) as folder:
        if folder is None:
            return {}
        splits = [dataset.pictures(dataset.train_split), dataset.pictures(dataset.val_split)]
        labels = [multi_hot(pictures, len(dataset.classes)) for pictures in splits]
        if classifier.hparams["freeze_backbone"]:
            loaders: list[Any] = []
            for name, pictures, split_labels in zip(
                (dataset.train_split, dataset.val_split), splits, labels, strict=True
            ):
                found = features(
                    store,
                    make_trainer,
                    classifier,
                    pictures,
                    local=name == dataset.prototype_split,
                    num_workers=num_workers,
                )
                pooled = np.stack([read_features(found, p, "pooled") for p in pictures])
                loaders.append(
                    pooled_loader(pooled, split_labels, batch_size=batch_size, shuffle=not loaders)
                )
        else:
            if long_side is None or crop is None:
                raise InputError("classifier.crop and classifier.long_side: needed to fine-tune")
            backbone = classifier.backbone
            transform = TrainTransform(backbone.mean, backbone.std, long_side, crop)
            loaders = [
                train_loader(
                    pictures,
                    len(dataset.classes),
                    transform,
                    batch_size=batch_size,
                    shuffle=index == 0,
                    num_workers=num_workers,
                )
                for index, pictures in enumerate(splits)
            ]
        checkpoint = ModelCheckpoint(
            folder, "last", enable_version_counter=False, every_n_epochs=validate_every
        )
        trainer = make_trainer(
            max_epochs=epochs,
            check_val_every_n_epoch=validate_every,
            num_sanity_val_steps=0,
            logger=logger or False,
            callbacks=[checkpoint, *([LearningRateMonitor("step")] if logger else [])],
        )
        last = folder / "last.ckpt"
        resume = str(last) if last.is_file() else None
        trainer.fit(classifier, loaders[0], loaders[1], ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(last)
        return {key: float(value) for key, value in trainer.callback_metrics.items()}
