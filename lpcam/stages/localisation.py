"""The stage of localisation scores: maps against true boxes and masks."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.evaluation.localisation import LocalisationCounts, count_pair
from lpcam.seeds.record import read_seed
from lpcam.storage.arrays import read_arrays
from lpcam.storage.hashing import digest
from lpcam.storage.parallel import for_each
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


def localisation(
    store: Path, maps: Mapping[str, Mapping[str, Stage]], dataset: SegmentationDataset
) -> dict[str, float]:
    """Score maps as localisation, see :class:`~lpcam.evaluation.localisation.LocalisationCounts`.

    Args:
        store: The store's folder.
        maps: Maps by name and split.
        dataset: Reads boxes and masks.

    Returns:
        The scores by ``<split>/<name>/<metric>``.
    """
    metrics: dict[str, float] = {}
    for split in dataset.map_splits:
        pictures = dataset.pictures(split)
        boxes = {picture.id: dataset.boxes(picture) for picture in pictures}
        truth = digest([sorted(boxes.items()), [dataset.mask_digest(p) for p in pictures]])
        for name, by_split in maps.items():
            found = by_split[split]
            stage = Stage(store, "localisation", {"maps": found.key, "truth": truth})
            with stage.build() as folder:
                if folder:
                    total = _count(found.records, dataset, pictures, boxes, f"{name} of {split}")
                    np.savez(folder / "counts.npz", **vars(total))
            kept = read_arrays(stage.folder / "counts.npz")
            total = LocalisationCounts(kept["hits"], int(kept["boxed"]), kept["pixels"])
            metrics |= {f"{split}/{name}/{key}": v for key, v in total.metrics().items()}
    return metrics


def _count(
    records: Records,
    dataset: SegmentationDataset,
    pictures: list[Picture],
    boxes: Mapping[str, Mapping[int, list[tuple[float, float, float, float]]]],
    title: str,
) -> LocalisationCounts:
    classes = len(dataset.classes)
    totals = [LocalisationCounts.zero(classes)]
    adding = threading.Lock()

    def count(picture: Picture) -> None:
        seed, mask = read_seed(records, picture.id), dataset.mask(picture)
        for index, scores in zip(seed.keys.tolist(), seed.maps, strict=True):
            true = boxes[picture.id].get(index, [])
            found = count_pair(scores, index, classes, mask, true)
            with adding:
                totals[0] += found

    for_each(count, pictures, f"Localising, {title}")
    return totals[0]
