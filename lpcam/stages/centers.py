"""The stage of cluster centres."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lpcam.data.dataset import Picture, SegmentationDataset, multi_hot
from lpcam.models.host import Host
from lpcam.prototypes.centers import Centers, Clustering, fit_centers
from lpcam.prototypes.local_features import Draw, draw_pictures
from lpcam.stages.features import read_features
from lpcam.storage.arrays import stored
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import dealt, gathered, is_main_process, joined
from lpcam.storage.store import Stage


def prototype_pictures(
    dataset: SegmentationDataset, draw: Draw
) -> tuple[list[Picture], list[list[int]]]:
    """Which pictures of the prototype split are clustered.

    Returns:
        The pictures whose features are needed, and for each class the indices of its pictures in
        the split.
    """
    pictures = dataset.pictures(dataset.prototype_split)
    chosen = draw_pictures(multi_hot(pictures, len(dataset.classes)), draw)
    if draw.images_per_class is None:  # the same stage as for training a head on the whole split
        return pictures, chosen
    return [pictures[index] for index in sorted(set().union(*chosen))], chosen


def centers(
    store: Path,
    found: Stage,
    host: Host,
    dataset: SegmentationDataset,
    settings: Clustering,
    chosen: Sequence[Sequence[int]],
) -> tuple[Stage, Centers]:
    """Centres of every class: ``centers.safetensors``.

    Args:
        store: The store's folder.
        found: The features of the prototype split.
        host: The trained host.
        dataset: The data.
        settings: How features are split and clustered.
        chosen: See :func:`prototype_pictures`.
    """
    inputs = {
        "features": found.key,
        "score": host.score_key,
        "chosen": digest(chosen),
        **asdict(settings),
    }
    stage = Stage(store, "centers", inputs)
    kept_maps = settings.split == "multi_scale" or not host.maps_from_features
    # Where processes can talk each clusters some of the classes; otherwise one does, others wait.
    with stage.build(together=joined()) as folder:
        if folder:
            pictures = dataset.pictures(dataset.prototype_split)

            def read_map(index: int, class_index: int) -> np.ndarray:
                place = (pictures[index].labels or ()).index(class_index)
                return read_features(found, pictures[index], "maps")[place]

            def fit() -> Centers:
                return fit_centers(
                    lambda index: read_features(found, pictures[index], "local"),
                    multi_hot(pictures, len(dataset.classes)),
                    host,
                    dataset.classes,
                    settings,
                    dim=host.backbone.dim,
                    read_map=read_map if kept_maps else None,
                    chosen=chosen,
                    only=dealt(len(dataset.classes)),
                    progress=is_main_process(),
                )

            whole = Centers.together(gathered(fit))
            if is_main_process() or not joined():
                whole.save(folder / "centers.safetensors")
    with stored(stage.folder / "centers.safetensors") as path:
        return stage, Centers.load(path)
