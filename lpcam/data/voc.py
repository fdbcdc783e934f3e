"""Data sets in the folder layout of PASCAL VOC 2012."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.errors import InputError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class VOC(SegmentationDataset):
    """A tree of JPEGImages, Annotations, SegmentationClass and ImageSets/Segmentation.

    Image labels come from the annotation files alone, objects marked difficult included, as the
    published recipes have it.

    Args:
        root: The folder that holds those four.
        classes: Class names in the order of the mask values.
        **splits: See :class:`~lpcam.data.dataset.SegmentationDataset`.
    """

    def __init__(
        self, root: str | Path, classes: Sequence[str] = CLASSES, **splits: str | Sequence[str]
    ) -> None:
        super().__init__(root, classes, **splits)  # type: ignore[arg-type]

    def pictures(self, split: str) -> list[Picture]:  # noqa: D102 - inherited
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such split; give dataset.root or another split")
        ids = path.read_text().split()
        if not ids:
            raise InputError(f"{path}: the split is empty; list at least one picture")
        return [self._picture(image_id, path) for image_id in ids]

    def _picture(self, image_id: str, listed_in: Path) -> Picture:
        if not re.fullmatch(r"[\w-][\w.-]*", image_id):
            raise InputError(f"{listed_in}: {image_id!r} is not a picture's name; remove it")
        image = self.root / "JPEGImages" / f"{image_id}.jpg"
        if not image.is_file():
            raise InputError(f"{image}: missing, but listed in {listed_in}; add or unlist it")
        mask = self.root / "SegmentationClass" / f"{image_id}.png"
        return Picture(image_id, image, self._labels(image_id), mask if mask.is_file() else None)

    def _labels(self, image_id: str) -> tuple[int, ...]:
        path = self.root / "Annotations" / f"{image_id}.xml"
        try:
            names = {item.findtext("name", "") for item in ElementTree.parse(path).iter("object")}
        except (OSError, ElementTree.ParseError) as error:
            raise InputError(f"{path}: not a readable annotation ({error}); restore it") from error
        unknown = names.difference(self.classes)
        if unknown:
            raise InputError(f"{path}: unknown class {min(unknown)!r}; known: {self.classes}")
        return tuple(sorted(self.classes.index(name) for name in names))
