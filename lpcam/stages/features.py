"""The stages up to the centres, each with the values that its result depends on.

Every function takes explicit arguments, looks its result up in the store and computes what is
missing. None knows of Hydra.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from lpcam.prototypes.centers import Centers, fit_centers
from lpcam.models.classifier import Classifier
from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint, multi_hot
from lpcam.data.loaders import view_loader
from lpcam.errors import InputError
from lpcam.stages.callbacks import FeatureCallback
from lpcam.prototypes.local_features import choose_pictures
from lpcam.storage.store import Stage
from lpcam.storage.hashing import digest

MakeTrainer = Callable[..., pl.Trainer]


def tensor_digest(value: Tensor) -> str:
    """Hash a tensor's bytes."""
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def predict(
    make_trainer: MakeTrainer,
    classifier: Classifier,
    pictures: Sequence[Picture],
    callback: Callback,
    *,
    done: Callable[[Picture], bool],
    scales: Sequence[float],
    flip: bool,
    batch_size: int,
    num_workers: int,
) -> None:
    """Run a writing callback over the pictures that an earlier, killed run did not finish."""
    missing = [picture for picture in pictures if not done(picture)]
    if not missing:
        return
    loader = view_loader(
        missing,
        classifier.num_classes,
        scales=scales,
        flip=flip,
        mean=classifier.backbone.mean,
        std=classifier.backbone.std,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    trainer = make_trainer(logger=False, callbacks=[callback], enable_checkpointing=False)
    trainer.predict(classifier.for_inference(), loader, return_predictions=False)
    trainer.strategy.barrier()


def features(
    store: Path,
    make_trainer: MakeTrainer,
    classifier: Classifier,
    pictures: Sequence[Picture],
    *,
    local: bool,
    num_workers: int,
    split: str = "single_view",
    scales: Sequence[float] = (),
    flip: bool = False,
) -> Stage:
    """Features of each picture at its own size, not mirrored: ``<id>.npz``.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        classifier: The classifier.
        pictures: The pictures.
        local: Whether local features are wanted, and not just their means.
        num_workers: Processes that decode pictures.
        split: What local features are going to be split by. ``single_view`` is the CAM of the
            features themselves, which takes nothing more. ``multi_scale`` is the published code's,
            see :func:`~lpcam.prototypes.multi_scale.sampled_cam`; it is kept with the features.
        scales: Scales of that CAM.
        flip: Whether mirror images are part of it.

    Raises:
        InputError: ``split`` is unknown, or scale 1, that of the features, is not among the scales.
    """
    if split not in ("single_view", "multi_scale"):
        raise InputError(f"prototypes.split={split}: unknown; choose single_view or multi_scale")
    sampled = split == "multi_scale"
    inputs: dict[str, Any] = {
        "backbone": classifier.backbone.fingerprint,
        "pictures": fingerprint(pictures),
        "local": local,
    }
    if sampled:
        if 1 not in scales:
            raise InputError(
                f"inference.scales={list(scales)}: prototypes.split=multi_scale takes features at "
                "scale 1; add it"
            )
        inputs["weight"] = tensor_digest(classifier.weight)
        inputs |= {"scales": sorted(scales), "flip": flip}
    stage = Stage(store, "features", inputs)
    with stage.build(resume=True) as folder:
        if folder:
            predict(
                make_trainer,
                classifier,
                pictures,
                FeatureCallback(
                    folder, local=local, cam_weight=classifier.weight if sampled else None
                ),
                done=lambda picture: (folder / f"{picture.id}.npz").is_file(),
                scales=[1.0, *(scale for scale in scales if sampled and scale != 1)],
                flip=sampled and flip,
                batch_size=1,
                num_workers=num_workers,
            )
    return stage


def read_features(stage: Stage, picture: Picture, name: str) -> np.ndarray:
    """One array of one picture from a features stage, see :class:`FeatureCallback`."""
    with np.load(stage.folder / f"{picture.id}.npz", allow_pickle=False) as file:
        return file[name]


def prototype_pictures(
    dataset: SegmentationDataset,
    *,
    images_per_class: int | None,
    with_replacement: bool,
    seed: int,
) -> tuple[list[Picture], list[list[int]]]:
    """Which pictures of the prototype split are clustered.

    Args:
        dataset: The data.
        images_per_class: See :func:`~lpcam.prototypes.local_features.choose_pictures`.
        with_replacement: Likewise.
        seed: Likewise.

    Returns:
        The pictures whose features are needed, and for each class the indices of its pictures in
        the split.
    """
    pictures = dataset.pictures(dataset.prototype_split)
    chosen = choose_pictures(
        multi_hot(pictures, len(dataset.classes)),
        images_per_class,
        with_replacement=with_replacement,
        seed=seed,
    )
    if images_per_class is None:  # the same stage as for training a head on the whole split
        return pictures, chosen
    return [pictures[index] for index in sorted(set().union(*chosen))], chosen


def centers(
    store: Path,
    found: Stage,
    classifier: Classifier,
    dataset: SegmentationDataset,
    *,
    k: int,
    tau: float,
    seed: int,
    init: str,
    tol: float,
    max_iter: int,
    allow_missing: bool,
    chosen: Sequence[Sequence[int]],
    split: str,
) -> tuple[Stage, Centers]:
    """Centres of every class: ``centers.safetensors``.

    Args:
        store: The store's folder.
        found: The features of the prototype split.
        classifier: The trained classifier.
        dataset: The data.
        k: Clusters on each side.
        tau: Threshold of the split into foreground and context.
        seed: Seed of the clustering.
        init: See :func:`~lpcam.prototypes.centers.fit_centers`.
        tol: Likewise.
        max_iter: Upper bound on its iterations.
        allow_missing: Skip a class without pictures.
        chosen: See :func:`prototype_pictures`.
        split: The same as for the features.
    """
    inputs = {
        "features": found.key,
        "weight": tensor_digest(classifier.weight),
        "k": k,
        "tau": tau,
        "seed": seed,
        "init": init,
        "tol": tol,
        "max_iter": max_iter,
        "allow_missing": allow_missing,
        "chosen": digest(chosen),
        "split": split,
    }
    stage = Stage(store, "centers", inputs)
    with stage.build() as folder:
        if folder:
            pictures = dataset.pictures(dataset.prototype_split)

            def read_cam(index: int, class_index: int) -> np.ndarray:
                place = (pictures[index].labels or ()).index(class_index)
                return read_features(found, pictures[index], "cam")[place]

            fit_centers(
                lambda index: read_features(found, pictures[index], "local"),
                multi_hot(pictures, len(dataset.classes)),
                classifier.weight,
                dataset.classes,
                k=k,
                tau=tau,
                seed=seed,
                init=init,
                tol=tol,
                max_iter=max_iter,
                allow_missing=allow_missing,
                chosen=chosen,
                read_cam=read_cam if split == "multi_scale" else None,
                progress=True,
            ).save(folder / "centers.safetensors")
    return stage, Centers.load(stage.folder / "centers.safetensors")
