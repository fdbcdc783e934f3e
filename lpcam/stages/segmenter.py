"""The stages of a segmentation network: its training, and its masks of pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import LearningRateMonitor

from lpcam.data.crops import RandomCrop, by_choice
from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint
from lpcam.errors import InputError
from lpcam.models.training import MakeTrainer, fit, per_process, readable
from lpcam.segmentation.crops import MaskedCrops, crop_loader
from lpcam.segmentation.file import save_network
from lpcam.segmentation.masks import Masks, usable
from lpcam.segmentation.networks import Architecture, SegmentationNetwork
from lpcam.segmentation.predict import predict_masks
from lpcam.segmentation.segmenter import Learning, Segmenter
from lpcam.storage.files import write_json
from lpcam.storage.hashing import tensors_digest
from lpcam.storage.ranks import is_main_process, rank
from lpcam.storage.store import Stage

NETWORK, CHECKPOINT, METRICS = "network.safetensors", "last.ckpt", "metrics.json"


def segmenter_stage(
    store: Path,
    dataset: SegmentationDataset,
    masks: Masks,
    network: SegmentationNetwork,
    architecture: Architecture,
    learning: Learning,
    *,
    seed: int,
    precision: str,
) -> Stage:
    """Where the network that learnt from these masks lies, or will lie.

    It holds ``network.safetensors`` and ``metrics.json``, those of the last epoch.

    Args:
        store: The store's folder.
        dataset: The data; the network learns from its training split.
        masks: What it learns from.
        network: The network before its training, whose first weights count.
        architecture: Which network it is.
        learning: How it learns.
        seed: Of first weights and crops.
        precision: What it is trained in.

    Raises:
        InputError: A picture has no mask.
    """
    pictures = dataset.pictures(dataset.train_split)
    how = asdict(learning)
    del how["save_every"]  # a checkpoint more or less changes nothing but
    how["steps"] = learning.rounds * learning.round_steps
    inputs = {
        "network": tensors_digest(network.state_dict()),
        "normalisation": [network.mean, network.std],
        "architecture": asdict(architecture),
        "learning": how,
        "precision": precision,
        "pictures": fingerprint(pictures),
        "classes": dataset.classes,
        "masks": masks.digest(pictures),
        "seed": seed,
    }
    if learning.pixel_weights == "confidence":
        inputs["confidence"] = masks.confidence_digest(pictures)
    return Stage(store, "segmenter", inputs)


def train(
    stage: Stage,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    masks: Masks,
    network: SegmentationNetwork,
    architecture: Architecture,
    learning: Learning,
    *,
    backbone: str,
    seed: int,
    num_workers: int | None,
    logger: Any,
) -> dict[str, float]:
    """Train the network, going on from the last checkpoint of a killed run.

    Args:
        stage: From :func:`segmenter_stage`.
        make_trainer: Makes Lightning's trainer.
        dataset: The data.
        masks: What it learns from.
        network: The network before its training.
        architecture: Which network it is.
        learning: How it learns.
        backbone: The backbone's name.
        seed: Of the crops.
        num_workers: Processes that decode pictures.
        logger: Lightning loggers.

    Returns:
        Metrics of the last steps.

    Raises:
        InputError: A mask cannot be used, or training diverged.
    """
    with stage.build(resume=True, together=True) as folder:
        if folder is None:
            return trained_metrics(stage)
        if all((folder / name).is_file() for name in (NETWORK, METRICS)):  # killed right after
            (folder / CHECKPOINT).unlink(missing_ok=True)
            return _metrics(folder)
        crops = MaskedCrops(
            usable(masks, dataset.pictures(dataset.train_split)),
            masks,
            RandomCrop(
                network.mean,
                network.std,
                scale=by_choice(learning.crop_scales),
                crop=learning.crop,
            ),
            seed=seed,
            confidence=learning.pixel_weights == "confidence",
        )

        def loaders(processes: int) -> tuple[Any, None]:
            loader = crop_loader(
                crops,
                steps=learning.round_steps,
                batch_size=per_process(learning.batch_size, processes, "segmenter.batch_size"),
                processes=processes,
                rank=rank(),
                first=_rounds_done(folder / CHECKPOINT, learning),
                num_workers=num_workers,
            )
            return loader, None

        metrics = fit(
            make_trainer,
            Segmenter(network, learning=learning, seed=seed),
            folder,
            loaders,
            epochs=learning.rounds,
            logger=logger,
            callbacks=(LearningRateMonitor("step"),) if logger else (),
            lr_setting="segmenter.lr",
        )
        if is_main_process():
            save_network(folder / NETWORK, network, dataset.classes, backbone, architecture)
            write_json(folder / METRICS, metrics)
            (folder / CHECKPOINT).unlink()  # the optimiser's state is as large as the network
        return metrics


def _rounds_done(checkpoint: Path, learning: Learning) -> int:
    """How many rounds a killed run has finished."""
    if not readable(checkpoint):
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return int(state["global_step"]) // learning.round_steps


def trained_metrics(stage: Stage) -> dict[str, float]:
    """Metrics of the last steps of a network that is trained."""
    return _metrics(stage.folder)


def _metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / METRICS).read_text())
    return found


def trained_network(stage: Stage, command: str) -> Path:
    """The file of a network that is trained.

    Args:
        stage: From :func:`segmenter_stage`.
        command: What trains it, for the error message.

    Raises:
        InputError: It is not trained yet.
    """
    if not stage.done:
        raise InputError(
            f"no segmentation network for these masks and settings; train it first:  {command}"
        )
    return stage.folder / NETWORK


def segmented(
    store: Path,
    make_trainer: MakeTrainer,
    segmenter: Segmenter,
    pictures: Sequence[Picture],
    *,
    precision: str,
    num_workers: int | None,
) -> Stage:
    """The network's masks of pictures, see :class:`~lpcam.segmentation.predict.MaskWriter`.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        segmenter: The trained network.
        pictures: The pictures; their labels are not looked at.
        precision: What it is run in.
        num_workers: Processes that decode pictures.
    """
    assert segmenter.testing is not None
    testing = asdict(segmenter.testing)
    del testing["test_batch_size"]
    inputs = {
        "network": tensors_digest(segmenter.network.state_dict()),
        "testing": testing,
        "precision": precision,
        "pictures": fingerprint(pictures),
    }
    stage = Stage(store, "segmented", inputs)
    with stage.build(resume=True, together=True) as folder:
        if folder:
            predict_masks(make_trainer, segmenter, pictures, folder, num_workers=num_workers)
    return stage
