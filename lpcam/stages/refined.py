"""The stage of refined maps, after that of training a refiner that learns."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint, open_picture
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.refiners.base import Refiner, TrainedRefiner
from lpcam.seeds.record import SeedRecord, read_seed, seed_bytes
from lpcam.storage.parallel import for_each
from lpcam.storage.ranks import is_main_process
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


def refined(
    store: Path,
    make_trainer: MakeTrainer,
    host: Host,
    refiner: Refiner,
    dataset: SegmentationDataset,
    found: Mapping[str, Stage],
    *,
    seed: int,
    num_workers: int | None,
) -> dict[str, Stage]:
    """Refined maps of every split, after training the refiner if it is a trained one.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        host: The trained host; its backbone serves the refiner too.
        refiner: The refiner.
        dataset: The data.
        found: The maps to refine by split; for a trained refiner those of the training split too.
        seed: Of the random numbers that a refiner is trained with.
        num_workers: Processes that decode pictures.

    Returns:
        A stage a split: seed records.
    """
    stages = {}
    common: dict[str, Any] = {}
    train_split = dataset.train_split
    if isinstance(refiner, TrainedRefiner):
        pictures = dataset.pictures(train_split)
        inputs = {
            "backbone": host.backbone.fingerprint,
            "precision": host.precision,
            "maps": found[train_split].key,
            "pictures": fingerprint(pictures),
            "settings": dict(refiner.training_inputs()),
            "seed": seed,
        }
        trained = Stage(store, f"{type(refiner).__name__.lower()}_network", inputs)
        with trained.build(resume=True, together=True) as folder:
            if folder:
                pl.seed_everything(seed, verbose=False)
                refiner.fit(
                    folder,
                    pictures,
                    partial(_read_seed, found[train_split].records),
                    host.backbone,
                    make_trainer,
                    num_workers=num_workers,
                )
        common["trained"] = trained.key
    if not is_main_process():
        return {}
    for split in dataset.map_splits:
        pictures = dataset.pictures(split)
        stage = Stage(
            store,
            "refined",
            {
                **common,
                **refiner.inputs(pictures),
                "maps": found[split].key,
                "pictures": fingerprint(pictures),
            },
        )
        stages[split] = stage
        with stage.build(resume=True) as folder:
            if not folder:
                continue
            if isinstance(refiner, TrainedRefiner):
                device = "cuda" if torch.cuda.is_available() else "cpu"
                refiner.load(trained.folder, host.backbone, device)
            refine = partial(_refine, refiner, found[split].records, Records(folder))
            for_each(refine, pictures, f"Refining {split}")
    return stages


def _read_seed(records: Records, picture: Picture) -> SeedRecord:
    return read_seed(records, picture.id)


def _refine(refiner: Refiner, seeds: Records, records: Records, picture: Picture) -> None:
    name = f"{picture.id}.npz"
    if name not in records:
        seed = read_seed(seeds, picture.id)
        found = refiner.refine(picture.id, open_picture(picture.path), seed)
        records.write(name, seed_bytes(found))
