"""The stages after the prototypes: maps of any number of settings, refined maps, scores.

As in :mod:`lpcam.stages.features`, every function takes explicit arguments, looks its result up in the
store and computes what is missing.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.storage.arrays import read_arrays
from lpcam.models.classifier import Classifier
from lpcam.data.dataset import (
    Picture,
    SegmentationDataset,
    fingerprint,
    multi_hot,
    open_image,
    open_picture,
)
from lpcam.errors import InputError
from lpcam.evaluation.segmentation import SegmentationResult, SegmentationScore
from lpcam.stages.callbacks import LPCAMCallback, MapHead
from lpcam.storage.parallel import for_each
from lpcam.stages.passes import MakeTrainer, predict
from lpcam.storage.hashing import tensor_digest
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.refiners.base import Refiner, TrainedRefiner
from lpcam.seeds.record import SeedRecord, load_seed, save_seed
from lpcam.storage.store import Stage
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import is_main_process


@dataclass(frozen=True)
class MapSetting:
    """One way of making maps: plain CAM, or LPCAM with these directions.

    Attributes:
        directions: Directions ``(C, D)``; None for plain CAM.
        offset: See :class:`~lpcam.stages.callbacks.MapHead`.
    """

    directions: Tensor | None = None
    offset: float = 0.0


def lpcam_setting(prototypes: Prototypes, use: str) -> MapSetting:
    """LPCAM with the prototypes of ``class``, of ``context`` or of ``both``."""
    # Without class prototypes the map is 1 - mean cosine to the context: how unlike it is.
    return MapSetting(prototypes.directions(use), 1.0 if use == "context" else 0.0)


def maps(
    store: Path,
    make_trainer: MakeTrainer,
    classifier: Classifier,
    pictures: Sequence[Picture],
    settings: Mapping[str, MapSetting],
    *,
    scales: Sequence[float],
    flip: bool,
    eps: float,
    keep_features: float,
    batch_size: int,
    num_workers: int,
) -> dict[str, Stage]:
    """Maps of every setting from one pass over the pictures: seed records ``<id>.npz``.

    The pass also keeps the features of all scales, if the pictures' are small enough. Then further
    settings of LPCAM are made from them, without the backbone.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        classifier: The trained classifier.
        pictures: The pictures.
        settings: What to compute, by name. Equal settings share a stage.
        scales: Factors on the pictures' size.
        flip: Add the mirror image.
        eps: See :func:`~lpcam.functional.normalize_maps`.
        keep_features: GB that the features of the pictures may take.
        batch_size: Pictures a forward pass.
        num_workers: Processes that decode pictures.

    Returns:
        The stage of each setting.
    """
    common = {
        "backbone": classifier.backbone.fingerprint,
        "pictures": fingerprint(pictures),
        "scales": list(scales),
        "flip": flip,
    }
    stages = {}
    inputs: dict[str, Any]
    for name, setting in settings.items():
        if setting.directions is None:
            inputs = {"head": "cam", "matrix": tensor_digest(classifier.weight)}
        else:
            matrix = tensor_digest(setting.directions)
            inputs = {"head": "lpcam", "matrix": matrix, "offset": setting.offset, "eps": eps}
        stages[name] = Stage(store, "maps", {**common, **inputs})
    distinct = {stages[name].key: name for name in settings}
    views = Stage(store, "views", common)
    with ExitStack() as stack:
        heads = []
        for key in sorted(distinct):  # every process takes the locks in the same order
            folder = stack.enter_context(stages[distinct[key]].build(resume=True))
            if folder:
                setting = settings[distinct[key]]
                heads.append(MapHead(folder, setting.directions, setting.offset))
        if not heads:
            return stages
        kept = None
        if views.done or _feature_bytes(classifier, pictures, scales) <= keep_features * 1e9:
            # Where another process is making them this waits, and finds them done.
            kept = stack.enter_context(views.build(resume=True)) or views.folder
            if kept == views.folder and all(head.directions is not None for head in heads):
                if is_main_process():
                    _maps_from_kept(views, classifier, pictures, heads, eps)
                return stages
        folders = [head.folder for head in heads] + ([kept] if kept else [])
        predict(
            make_trainer,
            classifier,
            pictures,
            LPCAMCallback(classifier.weight, heads, eps=eps, kept=kept),
            done=lambda p: all((folder / f"{p.id}.npz").is_file() for folder in folders),
            scales=scales,
            flip=flip,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    return stages


def _feature_bytes(
    classifier: Classifier, pictures: Sequence[Picture], scales: Sequence[float]
) -> float:
    """Bytes of the kept features of all scales, were the network of stride 16."""
    positions = 0
    for picture in pictures:
        with open_image(picture.path, decode=False) as image:
            positions += sum(
                math.ceil(image.width * scale / 16) * math.ceil(image.height * scale / 16)
                for scale in scales
            )
    return 2.0 * positions * classifier.backbone.dim


def _maps_from_kept(
    views: Stage,
    classifier: Classifier,
    pictures: Sequence[Picture],
    heads: Sequence[MapHead],
    eps: float,
) -> None:
    """What a pass of :class:`LPCAMCallback` would write, without the backbone."""
    writer = LPCAMCallback(classifier.weight, heads, eps=eps)

    def write(picture: Picture) -> None:
        if all((head.folder / f"{picture.id}.npz").is_file() for head in heads):
            return
        with open_image(picture.path, decode=False) as image:
            size = (image.height, image.width)
        kept = read_arrays(views.folder / f"{picture.id}.npz")
        features = [torch.from_numpy(own)[None, None].float() for own in kept.values()]
        labels = torch.from_numpy(multi_hot([picture], classifier.num_classes)).bool()
        writer.write([picture.id], features, labels, size)

    for_each(write, pictures, "Maps")


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
        found = {own[split].key: own[split] for own in maps.values()}
        stages = {
            key: Stage(store, "scores", {"maps": key, "masks": digest(masks), "bins": 100})
            for key in found
        }
        _score(stages, found, dataset, pictures)
        for name, own in maps.items():
            total = SegmentationScore(len(dataset.classes))
            file = stages[own[split].key].folder / "histogram.npy"
            total.histogram = np.load(file, allow_pickle=False)
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
                todo.append((folder, found[key].folder, SegmentationScore(len(dataset.classes))))
        adding = threading.Lock()

        def score(picture: Picture) -> None:
            mask = dataset.mask(picture)
            if mask is None:
                return
            for _, source, total in todo:
                seed = load_seed(source / f"{picture.id}.npz")
                if mask.shape != seed.size:
                    raise InputError(
                        f"{picture.mask_path or picture.id}: mask of {mask.shape[1]}x"
                        f"{mask.shape[0]} pixels, picture of {seed.size[1]}x{seed.size[0]}; "
                        "give its own mask"
                    )
                counts = total.count(seed.full_size(), seed.keys, mask)
                with adding:
                    total.histogram += counts

        if todo:
            for_each(score, pictures, "Scoring")
        for folder, _, total in todo:
            np.save(folder / "histogram.npy", total.histogram)


def _read_seed(folder: Path, picture: Picture) -> SeedRecord:
    return load_seed(folder / f"{picture.id}.npz")


def refined(
    store: Path,
    make_trainer: MakeTrainer,
    classifier: Classifier,
    refiner: Refiner,
    dataset: SegmentationDataset,
    found: Mapping[str, Stage],
    *,
    num_workers: int,
) -> dict[str, Stage]:
    """Refined maps of every split, after training the refiner if it is a trained one.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        classifier: The trained classifier.
        refiner: The refiner.
        dataset: The data.
        found: The maps to refine by split; for a trained refiner those of the training split too.
        num_workers: Processes that decode pictures.

    Returns:
        A stage a split: seed records ``<id>.npz``.
    """
    stages = {}
    common: dict[str, Any] = {}
    train_split = dataset.train_split
    if isinstance(refiner, TrainedRefiner):
        pictures = dataset.pictures(train_split)
        inputs = {
            "backbone": classifier.backbone.fingerprint,
            "maps": found[train_split].key,
            "pictures": fingerprint(pictures),
            "settings": dict(refiner.training_inputs()),
        }
        trained = Stage(store, f"{type(refiner).__name__.lower()}_network", inputs)
        with trained.build(resume=True) as folder:
            if folder:
                refiner.fit(
                    folder,
                    pictures,
                    partial(_read_seed, found[train_split].folder),
                    classifier.backbone,
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
                refiner.load(trained.folder, classifier.backbone, device)
            refine = partial(_refine, refiner, found[split].folder, folder)
            for_each(refine, pictures, f"Refining {split}")
    return stages


def _refine(refiner: Refiner, seeds: Path, folder: Path, picture: Picture) -> None:
    target = folder / f"{picture.id}.npz"
    if not target.is_file():
        seed = _read_seed(seeds, picture)
        save_seed(target, refiner.refine(picture.id, open_picture(picture.path), seed))
