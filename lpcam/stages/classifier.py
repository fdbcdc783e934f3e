"""The stage that trains the host, on pictures or on their features."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import LearningRateMonitor

from lpcam.data.dataset import SegmentationDataset, fingerprint
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer, fit
from lpcam.stages.batches import Fitting, loaders
from lpcam.storage.arrays import stored
from lpcam.storage.files import write_json
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import is_main_process
from lpcam.storage.store import Stage, results


def classifier_stage(
    store: Path,
    dataset: SegmentationDataset,
    backbone: Backbone,
    settings: Mapping[str, Any],
    *,
    seed: int,
    precision: str,
    base: Stage | None = None,
) -> Stage:
    """Where the trained host for these settings lies, or will lie.

    It holds ``last.ckpt`` and ``metrics.json``, those of the last epoch.

    Args:
        store: The store's folder.
        dataset: The data.
        backbone: The backbone before its training.
        settings: Settings of the host and of its training.
        seed: Of everything random in it.
        precision: What is computed in.
        base: The stage of the host that it begins with, if it does.
    """
    inputs: dict[str, Any] = {
        "backbone": backbone.fingerprint,
        "precision": precision,
        "pictures": fingerprint(dataset.pictures(dataset.train_split)),
        "classes": dataset.classes,
        "settings": dict(settings),
        "seed": seed,
    }
    if base:
        inputs["base"] = base.key
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
    num_workers: int | None,
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
            return trained_metrics(stage, dataset)
        metrics = fit(
            make_trainer,
            host,
            folder,
            loaders(store, make_trainer, dataset, host, fitting, num_workers),
            epochs=fitting.epochs,
            validate_every=fitting.validate_every,
            logger=logger,
            callbacks=(LearningRateMonitor("step"),) if logger else (),
        )
        if is_main_process():
            write_json(folder / "validated.json", _validated(dataset))
            write_json(folder / "metrics.json", metrics)
        return metrics


def trained_metrics(stage: Stage, dataset: SegmentationDataset) -> dict[str, float]:
    """Metrics of the last epoch of a host that is trained.

    Args:
        stage: The stage.
        dataset: The data. Metrics of a validation on other pictures than it has now are left out.
    """
    with stored(stage.folder / "metrics.json") as path:
        metrics: dict[str, float] = json.loads(path.read_text())
    validated = stage.folder / "validated.json"
    if validated.is_file() and json.loads(validated.read_text()) != _validated(dataset):
        print("Other validation pictures than in the training: scores on them are left out")
        return {name: value for name, value in metrics.items() if not name.startswith("val/")}
    return metrics


def _validated(dataset: SegmentationDataset) -> dict[str, str]:
    return {"pictures": fingerprint(dataset.pictures(dataset.val_split))}
