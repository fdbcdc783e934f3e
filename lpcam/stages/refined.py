"""The stage of refined maps, after that of training a refiner that learns."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

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


def trained_refiner(
    store: Path,
    make_trainer: MakeTrainer,
    host: Host,
    refiner: TrainedRefiner,
    dataset: SegmentationDataset,
    maps: Stage,
    *,
    seed: int,
    num_workers: int | None,
) -> Stage:
    """Train a refiner.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        host: The trained host; its backbone serves the refiner too.
        refiner: The refiner.
        dataset: The data.
        maps: The maps of the training split.
        seed: Of the random numbers that it is trained with.
        num_workers: Processes that decode pictures.

    Returns:
        A stage with what the refiner loads.
    """
    pictures = dataset.pictures(dataset.train_split)
    inputs = {
        "backbone": host.backbone.fingerprint,
        "precision": host.precision,
        "maps": maps.key,
        "pictures": fingerprint(pictures),
        "settings": dict(refiner.training_inputs()),
        "seed": seed,
    }
    stage = Stage(store, f"{type(refiner).__name__.lower()}_network", inputs)
    with stage.build(resume=True, together=True) as folder:
        if folder:
            pl.seed_everything(seed, verbose=False)
            refiner.fit(
                folder,
                pictures,
                partial(_read_seed, maps.records),
                host.backbone,
                make_trainer,
                num_workers=num_workers,
            )
    return stage


def load_trained(refiner: TrainedRefiner, trained: Stage, host: Host) -> None:
    """Read what :func:`trained_refiner` left."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    refiner.load(trained.folder, host.backbone, device)


def refined(
    store: Path,
    host: Host,
    refiner: Refiner,
    trained: Stage | None,
    dataset: SegmentationDataset,
    found: Mapping[str, Stage],
) -> dict[str, Stage]:
    """Refined maps of every split.

    Args:
        store: The store's folder.
        host: The trained host.
        refiner: The refiner.
        trained: For a trained refiner what :func:`trained_refiner` gave.
        dataset: The data.
        found: The maps to refine by split.

    Returns:
        A stage a split: seed records. Only the main process makes them.
    """
    if not is_main_process():
        return {}
    stages = {}
    common = {"trained": trained.key} if trained else {}
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
            if trained and isinstance(refiner, TrainedRefiner):
                load_trained(refiner, trained, host)
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
