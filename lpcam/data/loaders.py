"""Loaders: pictures to batches, for training and for inference."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lpcam.data.dataset import Picture, multi_hot, open_image, open_picture
from lpcam.data.transforms import normalize_bytes, rescale, to_bytes


class ViewBatch(TypedDict):
    """Pictures of one size at several scales.

    Attributes:
        ids: Names of the B pictures.
        labels: Image labels ``(B, C)`` of zeros and ones.
        size: Height and width of the pictures in pixels.
        views: For each scale, pictures ``(B, 3, h, w)``: bytes as they are loaded, a quarter of
            what has to be moved, then :func:`normalized` where they are used.
        flip: Whether the mirror images are wanted too.
    """

    ids: list[str]
    labels: Tensor
    size: tuple[int, int]
    views: list[Tensor]
    flip: bool


class _ViewBatches(Dataset[ViewBatch]):
    """Items are whole batches, so that Lightning can deal them out to processes as they are."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        num_classes: int,
        scales: Sequence[float],
        flip: bool,
        batch_size: int,
    ) -> None:
        self.labels = torch.from_numpy(multi_hot(pictures, num_classes))
        self.pictures = pictures
        self.scales = scales
        self.flip = flip
        self.batches: list[list[int]] = [[i] for i in range(len(pictures))]
        if batch_size > 1:
            by_size = defaultdict(list)
            for index, picture in enumerate(pictures):
                with open_image(picture.path, decode=False) as image:
                    by_size[image.size].append(index)
            self.batches = [
                group[start : start + batch_size]
                for group in by_size.values()
                for start in range(0, len(group), batch_size)
            ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ViewBatch:
        chosen = [self.pictures[i] for i in self.batches[index]]
        images = [open_picture(picture.path) for picture in chosen]
        return {
            "ids": [picture.id for picture in chosen],
            "labels": self.labels[self.batches[index]],
            "size": (images[0].height, images[0].width),
            "views": [
                torch.stack([to_bytes(rescale(image, scale)) for image in images])
                for scale in self.scales
            ],
            "flip": self.flip,
        }


def view_loader(
    pictures: Sequence[Picture],
    num_classes: int,
    *,
    scales: Sequence[float],
    flip: bool,
    batch_size: int = 1,
    num_workers: int | None = 0,
    processes: int = 1,
) -> DataLoader[ViewBatch]:
    """Load every picture once, at every scale; pictures of equal size share a batch.

    Args:
        pictures: The pictures.
        num_classes: Number of classes C.
        scales: Factors on the pictures' own size.
        flip: Whether the mirror images are wanted too.
        batch_size: Pictures a batch at most.
        num_workers: Processes that decode.
        processes: Processes that share the batches. Where there are fewer batches the last one is
            given several times, for Lightning refuses to give none.
    """
    batches = _ViewBatches(pictures, num_classes, scales, flip, batch_size)
    batches.batches += batches.batches[-1:] * (processes - len(batches.batches))
    return DataLoader(
        batches,
        batch_size=None,
        **decoders(num_workers),
        pin_memory=torch.cuda.is_available(),  # then copies to a GPU need not wait
    )


def normalized(batch: ViewBatch, mean: Sequence[float], std: Sequence[float]) -> ViewBatch:
    """A batch whose views are normalised, on the device that it is on.

    Args:
        batch: The batch as it was loaded.
        mean: Per-channel mean.
        std: Per-channel standard deviation.
    """
    return {**batch, "views": [normalize_bytes(view, mean, std) for view in batch["views"]]}


def decoders(num_workers: int | None) -> dict[str, Any]:
    """Arguments of torch's ``DataLoader`` for so many processes that decode pictures.

    Args:
        num_workers: How many. None for one on the CPU, where the network needs the cores itself,
            and for at most eight with a GPU, which shares the cores with the others.
    """
    if num_workers is None:
        gpus, num_workers = torch.cuda.device_count(), 1
        if gpus:
            # Slurm gives a job some of the machine's cores; only Linux tells which.
            linux = sys.platform == "linux"
            cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
            num_workers = min(8, max(1, cores // gpus - 1))
    # Under joblib the processes of a loader could not start the way that joblib's own do.
    start = "fork" if num_workers and sys.platform == "linux" else None
    return {"num_workers": num_workers, "multiprocessing_context": start}


class _TrainPictures(Dataset[tuple[Tensor, Tensor]]):
    def __init__(
        self,
        pictures: Sequence[Picture],
        num_classes: int,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.pictures = pictures
        self.labels = torch.from_numpy(multi_hot(pictures, num_classes))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(open_picture(self.pictures[index].path)), self.labels[index]


def train_loader(
    pictures: Sequence[Picture],
    num_classes: int,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int,
    shuffle: bool = True,
    num_workers: int | None = 0,
    processes: int = 1,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of (pictures ``(B, 3, H, W)``, labels ``(B, C)``), see :func:`item_loader`."""
    pairs = _TrainPictures(pictures, num_classes, transform)
    return item_loader(
        pairs,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        processes=processes,
    )


def item_loader(
    items: Any,
    *,
    batch_size: int,
    shuffle: bool = True,
    num_workers: int | None = 0,
    collate: Callable[..., Any] | None = None,
    processes: int = 1,
) -> DataLoader[Any]:
    """Batches of a data set's items; of shuffled ones an incomplete last batch is left out.

    It is not where there would be no other.

    Args:
        items: The data set.
        batch_size: Items a batch of each process.
        shuffle: Whether their order is drawn anew in each epoch.
        num_workers: Processes that make items.
        collate: Makes a batch of a list of items; by default they are stacked.
        processes: Processes that share the items.
    """
    return DataLoader(
        items,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle and len(items) >= batch_size * processes,
        **decoders(num_workers),
        collate_fn=collate,
    )


def pooled_loader(
    pooled: np.ndarray, labels: np.ndarray, *, batch_size: int, shuffle: bool = True
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of (mean features ``(B, D)``, labels ``(B, C)``), for a frozen backbone."""
    pairs = TensorDataset(torch.from_numpy(pooled), torch.from_numpy(labels))
    return DataLoader(pairs, batch_size=batch_size, shuffle=shuffle)
