"""MS COCO 2014 and 2017: labels and masks from the instances file."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from rich.console import Console

from lpcam.data.dataset import (
    IGNORED,
    Box,
    Classes,
    Picture,
    SegmentationDataset,
    TrueInstances,
    keep_labelled,
    known_classes,
)
from lpcam.data.files import abbreviate, check_name, missing_files
from lpcam.errors import InputError
from lpcam.settings import CHECKED, Text
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import is_main_process

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
FAR = 1e6  # pixels; polygons beyond take pycocotools all memory there is
# COCO's own ids of these 80: ten of the first 90 were never annotated.
CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


@dataclass(frozen=True)
class _Instances:
    """An instances file.

    Attributes:
        index: pycocotools' index of it.
        images: Its records of pictures by file name, in its order.
        labels: Class index of the category ids that are used.
    """

    index: Any
    images: dict[str, dict[str, Any]]
    labels: dict[int, int]


class COCO(SegmentationDataset):
    """A tree of annotations/instances_<split><year>.json and the folders <split><year>.

    Masks are drawn when they are asked for, in the order of the file: a later annotation lies on
    top. With a choice of classes, objects of the others are 255 in masks, and pictures that show
    none of the chosen are left out and counted.

    Args:
        root: The folder that holds those.
        classes: The classes to use, in any order; None for all that the tree has.
        tree_classes: All classes of the tree in ascending order of their category ids. By default
            COCO's 80, or ``classes`` if none of these is one of them.
        year: 2014 or 2017.
        crowd: What a region is that is annotated as a crowd: ``background``, as if it were not
            annotated; ``ignore``, a label of the picture, but 255 in the mask; ``foreground``, an
            object like any other.
        unlabelled: Whether to ``keep`` or to ``drop`` pictures without any label.
        **splits: See :class:`~lpcam.data.dataset.SegmentationDataset`.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        classes: Classes | None = None,
        *,
        tree_classes: Classes | None = None,
        year: Literal[2014, 2017] = 2014,
        crowd: Literal["background", "ignore", "foreground"] = "background",
        unlabelled: Literal["keep", "drop"] = "keep",
        **splits: Any,
    ) -> None:
        every = tree_classes or known_classes(classes, CLASSES)
        super().__init__(root=root, classes=classes or every, tree_classes=every, **splits)
        self.year = year
        self.crowd = crowd
        self.unlabelled = unlabelled
        # An instances file has up to 450 MB: read it once.
        self._instances: dict[str, _Instances] = {}
        self._pictures: dict[str, list[Picture]] = {}

    def pictures(self, split: str) -> list[Picture]:  # noqa: D102 - inherited
        if split not in self._pictures:
            self._pictures[split] = self._read(f"{split}{self.year}")
        return self.kept(split, self._pictures[split])

    def mask(self, picture: Picture) -> np.ndarray:  # noqa: D102 - inherited
        name = picture.path.parent.name
        instances = self._load(name)
        image = instances.images[picture.path.name]
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in self._annotations(instances, image):
            label = instances.labels.get(annotation["category_id"])
            ignored = annotation.get("iscrowd") and self.crowd == "ignore"
            value = IGNORED if label is None or ignored else label + 1
            mask[self._draw(picture, annotation)] = value
        return mask

    def instances(self, picture: Picture) -> TrueInstances:
        """The annotated masks, those of crowds marked, whatever ``crowd`` says."""
        instances = self._load(picture.path.parent.name)
        image = instances.images[picture.path.name]
        items = [
            item
            for item in instances.index.imgToAnns.get(image["id"], [])
            if item["category_id"] in instances.labels
        ]
        return TrueInstances(
            [instances.labels[item["category_id"]] for item in items],
            [self._draw(picture, item) for item in items],
            [bool(item.get("iscrowd")) for item in items],
            np.zeros((image["height"], image["width"]), bool),
        )

    def coco_ids(self, picture: Picture) -> tuple[int, Sequence[int]]:  # noqa: D102 - inherited
        instances = self._load(picture.path.parent.name)
        categories = {label: category for category, label in instances.labels.items()}
        return (
            instances.images[picture.path.name]["id"],
            [categories[label] for label in range(len(self.classes))],
        )

    def boxes(self, picture: Picture) -> dict[int, list[Box]]:
        """The annotated boxes by class, those of crowds left out."""
        instances = self._load(picture.path.parent.name)
        image = instances.images[picture.path.name]
        found: dict[int, list[Box]] = {}
        for item in self._annotations(instances, image):
            label = instances.labels.get(item["category_id"])
            if label is not None and not item.get("iscrowd"):
                try:
                    left, top, width, height = item["bbox"]
                except (KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"{self._file(picture.path.parent.name)}: annotation {item.get('id')} of "
                        f"{picture.id} has no box; restore the file"
                    ) from error
                found.setdefault(label, []).append(
                    (
                        left / image["width"],
                        top / image["height"],
                        (left + width) / image["width"],
                        (top + height) / image["height"],
                    )
                )
        return found

    def mask_digest(self, picture: Picture) -> str:  # noqa: D102 - inherited
        instances = self._load(picture.path.parent.name)
        image = instances.images[picture.path.name]
        regions = [
            (
                instances.labels.get(item["category_id"]),
                item.get("iscrowd"),
                item.get("segmentation"),
            )
            for item in self._annotations(instances, image)
        ]
        return digest([image["height"], image["width"], self.crowd, regions])

    def _file(self, name: str) -> Path:
        return self.root / "annotations" / f"instances_{name}.json"

    def _annotations(self, instances: _Instances, image: dict[str, Any]) -> list[dict[str, Any]]:
        """What counts of a picture's annotations, in the order of the file."""
        return [
            item
            for item in instances.index.imgToAnns.get(image["id"], [])
            if self.crowd != "background" or not item.get("iscrowd")
        ]

    def _draw(self, picture: Picture, annotation: dict[str, Any]) -> np.ndarray:
        """Where an annotation of a picture is, ``(H, W)`` bool."""
        name = picture.path.parent.name
        instances = self._load(name)
        image = instances.images[picture.path.name]
        mask = np.zeros((image["height"], image["width"]), bool)
        try:
            mask[_region(instances.index, annotation, mask.size) > 0] = True
        except Exception as error:  # pycocotools raises no narrower one
            raise InputError(
                f"{self._file(name)}: annotation {annotation.get('id')} of {picture.id} cannot "
                f"be drawn ({type(error).__name__}: {error}); restore the file"
            ) from error
        return mask

    def _load(self, name: str) -> _Instances:
        if name not in self._instances:
            path = self._file(name)
            try:
                self._instances[name] = self._check_index(path, _open_index(path))
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}: not an instances file ({type(error).__name__}: {error}); restore it"
                ) from error
        return self._instances[name]

    def _check_index(self, path: Path, index: Any) -> _Instances:
        """Make sure of the names, ids and categories that everything else relies on."""
        ids = sorted(index.cats)
        names = [index.cats[category]["name"] for category in ids]
        if names != list(self.tree_classes):
            raise InputError(
                f"{path}: {len(names)} categories ({abbreviate(names)}), not the "
                f"{len(self.tree_classes)} of dataset.tree_classes "
                f"({abbreviate(self.tree_classes)}); use COCO's own file or set them"
            )
        images: dict[str, dict[str, Any]] = {}
        stems = set()
        for image in index.dataset["images"]:
            name = check_name(image["file_name"], f"{path}: file_name of image {image['id']}")
            if Path(name).stem in stems or index.imgs[image["id"]] is not image:
                raise InputError(
                    f"{path}: image {image['id']}, {name}, has the id or the name of another; "
                    "remove one"
                )
            if min(image["height"], image["width"]) < 1:
                raise InputError(f"{path}: image {image['id']} has no pixels; restore the file")
            stems.add(Path(name).stem)
            images[name] = image
        if not images:
            raise InputError(f"{path}: the split is empty; restore the file")
        unknown = index.catToImgs.keys() - index.cats.keys()
        if unknown:
            raise InputError(f"{path}: annotations of unknown category {min(unknown)}; restore it")
        labels = {
            category: self.classes.index(name)
            for category, name in zip(ids, names, strict=True)
            if name in self.classes
        }
        return _Instances(index, images, labels)

    def _read(self, name: str) -> list[Picture]:
        instances, folder = self._load(name), self.root / name
        lacks = missing_files(folder, list(instances.images))
        if lacks:
            raise InputError(f"{self._file(name)}: {lacks}; restore these files")
        pictures = []
        for file_name, image in instances.images.items():
            labels = {
                instances.labels[item["category_id"]]
                for item in self._annotations(instances, image)
                if item["category_id"] in instances.labels
            }
            path = folder / file_name
            pictures.append(Picture(path.stem, path, tuple(sorted(labels))))
        if self.chosen:
            return keep_labelled(pictures, str(self._file(name)))
        labelled = [picture for picture in pictures if picture.labels]
        if is_main_process():
            Console(stderr=True, soft_wrap=True, markup=False).print(
                f"{name}: {len(pictures)} pictures, {len(pictures) - len(labelled)} of them "
                f"without labels (dataset.unlabelled={self.unlabelled})"
            )
        if self.unlabelled == "keep":
            return pictures
        if not labelled:
            raise InputError(f"{self._file(name)}: no picture has a label; see dataset.unlabelled")
        return labelled


def _open_index(path: Path) -> Any:
    try:
        from pycocotools import coco
    except ImportError as error:
        raise InputError(
            "pycocotools: not installed, needed for dataset=coco; pip install 'lpcam[coco]'"
        ) from error
    if not path.is_file():
        raise InputError(
            f"{path}: no such split; check dataset.root, dataset.year and the splits' names"
        )
    try:
        # It tells its progress on stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            return coco.COCO(str(path))
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(f"{path}: not a readable instances file ({error}); restore it") from error


def _runs(code: str) -> list[int]:
    """The runs that COCO's compressed code stands for, which pycocotools gives to nobody.

    A number is given by five bits a character, the lowest first, with a sixth that tells whether it
    goes on; from the fourth on it is the difference to the number before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code:
        part = ord(character) - 48
        value |= (part & 31) << shift
        shift += 5
        if part & 32:
            continue
        if part & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _region(index: Any, annotation: dict[str, Any], pixels: int) -> np.ndarray:
    """Where an annotation is, ``(H, W)`` of zeros and ones."""
    segmentation = annotation["segmentation"]
    counts = None
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = _runs(counts) if isinstance(counts, str) else counts
    elif not all(abs(value) <= FAR for part in segmentation for value in part):  # NaN neither
        raise ValueError("a point far outside the picture")
    # pycocotools would fill what runs leave out with whatever the memory holds.
    if isinstance(counts, list) and (sum(counts) != pixels or min(counts) < 0):
        raise ValueError(f"runs of {sum(counts)} pixels, picture of {pixels}")
    region: np.ndarray = index.annToMask(annotation)
    return region
