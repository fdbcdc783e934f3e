"""The stage of scores: maps against true masks, at every threshold."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lpcam.data.dataset import Picture, SegmentationDataset, read_mask
from lpcam.errors import InputError
from lpcam.evaluation.labels import LabelScore
from lpcam.evaluation.segmentation import SegmentationResult, SegmentationScore
from lpcam.seeds.record import read_seed
from lpcam.storage.arrays import stored
from lpcam.storage.hashing import digest
from lpcam.storage.parallel import for_each
from lpcam.storage.store import Stage


def scores(
    store: Path, maps: Mapping[str, Mapping[str, Stage]], dataset: SegmentationDataset
) -> dict[str, dict[str, SegmentationResult]]:
    """Compare maps with the true masks, at every threshold.

    Args:
        store: The store's folder.
        maps: Maps by name and split. Each true mask is read once for all names.
        dataset: Reads the masks.

    Returns:
        Scores by name and split; a split of which no picture has a mask is left out.

    Raises:
        InputError: A mask has another size than its picture.
    """
    results: dict[str, dict[str, SegmentationResult]] = {name: {} for name in maps}
    for split in dataset.map_splits:
        pictures = dataset.pictures(split)
        masks = [mask for p in pictures if (mask := dataset.mask_digest(p))]
        if not masks:
            continue
        found = {by_split[split].key: by_split[split] for by_split in maps.values()}
        stages = {
            key: Stage(store, "scores", {"maps": key, "masks": digest(masks), "bins": 100})
            for key in found
        }
        _score(stages, found, dataset, pictures)
        for name, by_split in maps.items():
            total = SegmentationScore(len(dataset.classes))
            with stored(stages[by_split[split].key].folder / "histogram.npy") as path:
                total.histogram = np.load(path, allow_pickle=False)
            results[name][split] = total.compute()
    return results


def _score(
    stages: Mapping[str, Stage],
    found: Mapping[str, Stage],
    dataset: SegmentationDataset,
    pictures: Sequence[Picture],
) -> None:
    with ExitStack() as stack:
        todo = []
        for key in sorted(stages):
            folder = stack.enter_context(stages[key].build())
            if folder:
                todo.append((folder, found[key].records, SegmentationScore(len(dataset.classes))))
        adding = threading.Lock()

        def score(picture: Picture) -> None:
            mask = dataset.mask(picture)
            if mask is None:
                return
            for _, source, total in todo:
                seed = read_seed(source, picture.id)
                if mask.shape != seed.size:
                    raise InputError(
                        f"{picture.mask_path or picture.id}: mask of {mask.shape[1]}x"
                        f"{mask.shape[0]} pixels, picture of {seed.size[1]}x{seed.size[0]}; "
                        "give its own mask"
                    )
                counts = total.count(seed.full_size(), seed.keys, mask)
                with adding:
                    total.add(counts, seed.keys)

        if todo:
            for_each(score, pictures, "Scoring")
        for folder, _, total in todo:
            np.save(folder / "histogram.npy", total.histogram)


def mask_scores(
    folders: Mapping[str, Mapping[str, Path]], dataset: SegmentationDataset
) -> dict[str, dict[str, SegmentationResult]]:
    """Compare masks with the true ones.

    Args:
        folders: Folders of ``<id>.png`` by name and split.
        dataset: Reads the true masks.

    Returns:
        Scores by name and split; a split of which no picture has a true mask is left out.

    Raises:
        InputError: A mask cannot be read, or has another size than the true one.
    """
    classes = len(dataset.classes)
    results: dict[str, dict[str, SegmentationResult]] = {name: {} for name in folders}
    adding = threading.Lock()
    for split in dict.fromkeys(split for found in folders.values() for split in found):
        totals = {name: LabelScore(classes) for name in folders if split in folders[name]}

        def score(
            picture: Picture, split: str = split, totals: dict[str, LabelScore] = totals
        ) -> None:
            truth = dataset.mask(picture)
            if truth is None:
                return
            for name, total in totals.items():
                path = folders[name][split] / f"{picture.id}.png"
                prediction = read_mask(path, classes)
                try:
                    counts = total.count(prediction, truth)
                except InputError as error:
                    raise InputError(f"{path}: {error}") from error
                with adding:
                    total.confusion += counts

        for_each(score, dataset.pictures(split), f"Scoring {split}")
        for name, total in totals.items():
            if total.confusion.any():
                results[name][split] = total.compute()
    return results
