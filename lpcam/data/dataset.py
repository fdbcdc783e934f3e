"""What every data set offers: pictures of a split, their image labels, and masks for scoring."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lpcam.errors import InputError


@dataclass(frozen=True)
class Picture:
    """One picture and what is known about it.

    Attributes:
        id: Name within the data set; also the name of every file made from it.
        path: The image file.
        labels: Indices of the classes it shows, ascending; from image labels, never from masks.
        mask_path: The mask, if there is one; for scoring only.
    """

    id: str
    path: Path
    labels: tuple[int, ...]
    mask_path: Path | None = None


class SegmentationDataset(ABC):
    """Pictures with image labels, and masks to score against.

    Args:
        root: The data set's folder.
        classes: Class names; a class's index is its place here, its mask value that plus one.
        train_split: The split the classifier learns from.
        val_split: The split that its accuracy is measured on.
        prototype_split: The split whose local features are clustered.
        map_splits: The splits for which maps are made and scored.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        *,
        train_split: str = "train",
        val_split: str = "val",
        prototype_split: str = "train",
        map_splits: Sequence[str] = ("train", "val"),
    ) -> None:
        self.root = Path(root).expanduser()
        self.classes = tuple(classes)
        self.train_split = train_split
        self.val_split = val_split
        self.prototype_split = prototype_split
        self.map_splits = tuple(map_splits)

    def prepare(self) -> None:  # noqa: B027 - nothing to do is the common case
        """Make the data set ready to read. Data that a user brings needs nothing."""

    @abstractmethod
    def pictures(self, split: str) -> list[Picture]:
        """The pictures of a split, in the data set's order.

        Raises:
            InputError: The split is missing, empty or names a file that is not there.
        """

    def mask(self, picture: Picture) -> np.ndarray | None:
        """The true mask ``(H, W)`` uint8 (0 background, class index + 1, 255 ignored), or None.

        Raises:
            InputError: The mask cannot be read.
        """
        if picture.mask_path is None:
            return None
        with open_image(picture.mask_path) as image:
            return np.asarray(image)


def open_image(path: Path, *, decode: bool = True) -> Image.Image:
    """Open an image file.

    Args:
        path: The file.
        decode: Read the pixels too, so that damage is found here.

    Raises:
        InputError: The file is missing, damaged or no image.
    """
    try:
        image = Image.open(path)
        if decode:
            image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error}); restore or remove it") from error
    return image


def fingerprint(pictures: Sequence[Picture]) -> str:
    """Hash what a computation sees of these pictures: ids, labels, and the files' size and time.

    Reading every byte would cost more than some stages do; a file that changes gets a new time.
    """
    rows = []
    for picture in pictures:
        stat = picture.path.stat()
        rows.append((picture.id, picture.labels, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def multi_hot(pictures: Sequence[Picture], num_classes: int) -> np.ndarray:
    """Image labels as an array ``(N, C)`` float32 of zeros and ones."""
    labels = np.zeros((len(pictures), num_classes), np.float32)
    for row, picture in enumerate(pictures):
        labels[row, list(picture.labels)] = 1
    return labels
