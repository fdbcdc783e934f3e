"""What a host is trained on: batches of the kind that it asks for by ``batches`` and ``frozen``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from lpcam.data.crops import RandomCrop, by_long_side, deit_augmentation
from lpcam.data.dataset import Picture, SegmentationDataset, multi_hot, open_image, open_picture
from lpcam.data.loaders import item_loader, pooled_loader, train_loader
from lpcam.errors import InputError
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer, per_process
from lpcam.settings import CHECKED, Count, Pair
from lpcam.stages.features import FeatureLimit, features, read_features
from lpcam.stages.passes import feature_bytes

Side = Annotated[int, Field(ge=1, le=8192)]
# Makes batches to learn from and to validate on, for one of so many processes that share them.
MakeLoaders = Callable[[int], tuple[Any, Any]]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Fitting:
    """How a host is trained, whichever it is.

    Attributes:
        epochs: Passes over the training split.
        validate_every: Epochs between validations; a checkpoint is written after each.
        batch_size: Pictures a step.
        long_side: Range in pixels that a picture's longer side is resized to; unused when frozen.
        crop: Side of the square crop in pixels; unused when frozen.
        augment: What is learnt from pictures: ``crop``, a random one at a random scale, or
            ``deit``, see :func:`~lpcam.data.crops.deit_augmentation`.
    """

    epochs: Count
    validate_every: Count
    batch_size: Count
    long_side: Pair[Side] | None = None
    crop: Side | None = None
    augment: Literal["crop", "deit"] = "crop"


def loaders(
    store: Path,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    host: Host,
    fitting: Fitting,
    num_workers: int | None,
) -> MakeLoaders:
    """What makes a host's batches.

    ``pictures``: (crops ``(B, 3, S, S)``, labels ``(B, C)``), of a frozen host (mean features
    ``(B, D)``, labels). ``grids``: (a list of B local features ``(D, h, w)``, labels).
    ``pairs``: (crops ``(B, 2, 3, S, S)``, labels ``(B, 2, C)``). ``seeds``: (crops, labels, labels
    of pixels ``(B, S, S)``). Validation gets pictures or mean features; with ``seeds`` there is
    none.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        dataset: The data.
        host: The host.
        fitting: How it is trained.
        num_workers: Processes that decode pictures.

    Raises:
        InputError: A setting that these batches need is missing or does not fit.
    """
    if host.frozen:
        return _from_features(store, make_trainer, dataset, host, fitting, num_workers)
    if fitting.crop is None or (fitting.augment == "crop" and fitting.long_side is None):
        raise InputError("classifier.crop and classifier.long_side: needed to train on pictures")
    norm, side = (host.backbone.mean, host.backbone.std), fitting.crop
    crop = RandomCrop(*norm, scale=by_long_side(fitting.long_side or (side, side)), crop=side)
    augment: Callable[[Image.Image], Tensor] = crop
    if fitting.augment == "deit":
        augment = deit_augmentation(*norm, crop=side)
    classes, pictures = len(dataset.classes), dataset.pictures(dataset.train_split)
    if host.batches == "pairs" and fitting.batch_size % 2:
        raise InputError(
            f"classifier.batch_size={fitting.batch_size}: pictures come in pairs; give an even "
            "number"
        )

    def make(processes: int) -> tuple[Any, Any]:
        size = per_process(fitting.batch_size, processes, "classifier.batch_size")
        validation = train_loader(
            dataset.pictures(dataset.val_split),
            classes,
            crop.whole,
            batch_size=size,
            shuffle=False,
            num_workers=num_workers,
        )
        shared = partial(item_loader, num_workers=num_workers, processes=processes)
        if host.batches == "pairs":
            pairs = PicturePairs(pictures, classes, crop)
            return shared(pairs, batch_size=size // 2), validation
        if host.batches == "seeds":
            seeds = SeededPictures(pictures, classes, host.seeds, crop)
            return shared(seeds, batch_size=size), None
        train = train_loader(
            pictures,
            classes,
            augment,
            batch_size=size,
            num_workers=num_workers,
            processes=processes,
        )
        return train, validation

    return make


def _from_features(
    store: Path,
    make_trainer: MakeTrainer,
    dataset: SegmentationDataset,
    host: Host,
    fitting: Fitting,
    num_workers: int | None,
) -> MakeLoaders:
    """Features of both splits, computed once: local ones to learn from, where the host asks."""
    grids = host.batches == "grids"
    stages, pooled = [], []
    for split in (dataset.train_split, dataset.val_split):
        pictures = dataset.pictures(split)
        # Local features for prototypes come of the same pass, if the store is to hold so many.
        local = (grids and split == dataset.train_split) or (
            split == dataset.prototype_split
            and feature_bytes(host, pictures, [1.0]) <= FeatureLimit().max_features * 1e9
        )
        stage = features(store, make_trainer, host, pictures, local=local, num_workers=num_workers)
        rows = np.stack([read_features(stage, picture, "pooled") for picture in pictures])
        stages.append(stage)
        pooled.append((rows, multi_hot(pictures, len(dataset.classes))))

    def make(processes: int) -> tuple[Any, Any]:
        size = per_process(fitting.batch_size, processes, "classifier.batch_size")
        train: Any = pooled_loader(*pooled[0], batch_size=size)
        if grids:
            pictures = dataset.pictures(dataset.train_split)
            items = FeatureGrids(pictures, len(dataset.classes), partial(read_features, stages[0]))
            train = item_loader(
                items,
                batch_size=size,
                num_workers=num_workers,
                collate=_listed,
                processes=processes,
            )
        return train, pooled_loader(*pooled[1], batch_size=size, shuffle=False)

    return make


class FeatureGrids(Dataset[tuple[Tensor, Tensor]]):
    """Local features ``(D, h, w)`` of each picture, and its labels ``(C,)``.

    Args:
        pictures: The pictures.
        num_classes: Number of classes C.
        read: Gives an array of a picture's features by its name.
    """

    def __init__(
        self, pictures: Sequence[Picture], num_classes: int, read: Callable[..., np.ndarray]
    ) -> None:
        self.pictures = pictures
        self.labels = torch.from_numpy(multi_hot(pictures, num_classes))
        self.read = read

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        local = torch.from_numpy(self.read(self.pictures[index], "local"))
        return local.float().permute(2, 0, 1).contiguous(), self.labels[index]


def _listed(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Grids differ in size, so they stay a list."""
    return [grid for grid, _ in items], torch.stack([labels for _, labels in items])


class PicturePairs(Dataset[tuple[Tensor, Tensor]]):
    """Each picture that shows a class with another one, drawn anew each time, that shares one.

    A picture that shares none with any other comes with itself.

    Args:
        pictures: The pictures.
        num_classes: Number of classes C.
        transform: What makes a crop of a picture.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        num_classes: int,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.pictures = pictures
        self.labels = torch.from_numpy(multi_hot(pictures, num_classes))
        self.transform = transform
        self.shown = self.labels.any(1).nonzero()[:, 0].tolist()

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = self.shown[index]
        sharing = (self.labels @ self.labels[first] > 0).nonzero()[:, 0]
        others = sharing[sharing != first]
        second = int(others[torch.randint(len(others), ())]) if len(others) else first
        pair = [first, second]
        crops = [self.transform(open_picture(self.pictures[i].path)) for i in pair]
        return torch.stack(crops), self.labels[pair]


class SeededPictures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Crops ``(3, S, S)``, labels ``(C,)`` and the crops' labels of pixels ``(S, S)`` int64.

    Args:
        pictures: The pictures.
        num_classes: Number of classes C.
        files: The label image of each picture by its id.
        crop: What cuts both out.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        num_classes: int,
        files: Mapping[str, Path],
        crop: RandomCrop,
    ) -> None:
        self.pictures = pictures
        self.labels = torch.from_numpy(multi_hot(pictures, num_classes))
        self.files = files
        self.crop = crop

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        picture = self.pictures[index]
        pixels, labels = self.crop.both(
            open_picture(picture.path), open_image(self.files[picture.id])
        )
        return pixels, self.labels[index], labels
