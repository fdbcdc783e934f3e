"""Data sets in the folder layout of PASCAL VOC 2012."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from lpcam.data.dataset import (
    IGNORED,
    Box,
    Classes,
    Picture,
    SegmentationDataset,
    TrueInstances,
    keep_labelled,
    known_classes,
    open_image,
    read_mask,
)
from lpcam.data.files import check_name, file_names, missing_files, read_lines
from lpcam.errors import InputError
from lpcam.settings import CHECKED, Text

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class VOC(SegmentationDataset):
    """A tree of JPEGImages, Annotations, SegmentationClass and ImageSets/Segmentation.

    SegmentationObject, where it is there too, has the masks of objects. Image labels come from the
    annotation files alone. A split is a list in
    ImageSets/Segmentation; pictures of ``test`` have no labels, for VOC keeps them to itself. The
    masks of ``train_aug`` come from SegmentationClassAug where that has them.

    With a choice of classes, objects of the others are 255 in masks, and pictures that show none of
    the chosen are left out and counted.

    Args:
        root: The folder that holds those four.
        classes: The classes to use, in any order; None for all that the tree has.
        tree_classes: All classes of the tree in the order of its mask values. By default VOC's 20,
            or ``classes`` if none of these is one of them.
        difficult: Whether an object marked difficult gives its picture a label; it does in the
            published recipes.
        train_list: The list of ``train``, in the place of ``train.txt`` among the tree's own lists.
            A line names a picture, or is a pair of paths, of which only the picture's name is read.
        val_list: The list of ``val``, likewise.
        train_aug_list: The list of ``train_aug``, which VOC itself does not have. By default
            ``train_aug.txt`` or ``trainaug.txt`` among the other lists.
        **splits: See :class:`~lpcam.data.dataset.SegmentationDataset`.

    Raises:
        InputError: The tree has no such class.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        classes: Classes | None = None,
        *,
        tree_classes: Classes | None = None,
        difficult: bool = True,
        train_list: Text | Path | None = None,
        val_list: Text | Path | None = None,
        train_aug_list: Text | Path | None = None,
        **splits: Any,
    ) -> None:
        every = tree_classes or known_classes(classes, CLASSES)
        super().__init__(root=root, classes=classes or every, tree_classes=every, **splits)
        self.difficult = difficult
        self.lists = {"train": train_list, "val": val_list, "train_aug": train_aug_list}
        # A split of train_aug's size has 10,582 annotation files: read them once.
        self._pictures: dict[str, list[Picture]] = {}

    def pictures(self, split: str) -> list[Picture]:  # noqa: D102 - inherited
        if split not in self._pictures:
            self._pictures[split] = self._read(split)
        return self.kept(split, self._pictures[split])

    def _read(self, split: str) -> list[Picture]:
        listed_in = self._list_file(split)
        ids = _read_ids(listed_in)
        images, annotations = self.root / "JPEGImages", self.root / "Annotations"
        labelled = split != "test" or not file_names(annotations).isdisjoint(
            f"{image_id}.xml" for image_id in ids
        )
        needed = {images: ".jpg", annotations: ".xml"} if labelled else {images: ".jpg"}
        lacks = [
            missing_files(folder, [image_id + suffix for image_id in ids])
            for folder, suffix in needed.items()
        ]
        if any(lacks):
            raise InputError(
                f"{listed_in}: {', '.join(filter(None, lacks))}; restore these files or take "
                "them off the list"
            )
        masks = {}
        for kind in ("", "Aug") if split == "train_aug" else ("",):
            folder = self.root / f"SegmentationClass{kind}"
            masks.update({name: folder / name for name in file_names(folder)})
        pictures = [
            Picture(
                image_id,
                images / f"{image_id}.jpg",
                self._labels(annotations / f"{image_id}.xml") if labelled else None,
                masks.get(f"{image_id}.png"),
            )
            for image_id in ids
        ]
        return keep_labelled(pictures, str(listed_in)) if self.chosen else pictures

    def _list_file(self, split: str) -> Path:
        lists = self.root / "ImageSets" / "Segmentation"
        given = self.lists.get(split)
        if given is not None:
            remedy = f"correct dataset.{split}_list"
            candidates = [Path(given).expanduser()]
        elif split != "train_aug":
            remedy = "dataset.root must be the folder VOC2012, or choose another split"
            candidates = [lists / f"{split}.txt"]
        else:
            remedy = (
                "give dataset.train_aug_list, or use dataset.train_split=train "
                "dataset.map_splits=[train]"
            )
            candidates = [lists / "train_aug.txt", lists / "trainaug.txt"]
        for path in candidates:
            if path.is_file():
                return path
        raise InputError(f"{candidates[0]}: no such split; {remedy}")

    def boxes(self, picture: Picture) -> dict[int, list[Box]]:
        """The annotated boxes by class, those of difficult objects only if they give labels.

        Raises:
            InputError: The annotation cannot be read.
        """
        path = self.root / "Annotations" / f"{picture.id}.xml"
        if not path.is_file():
            return {}
        with open_image(picture.path, decode=False) as image:
            width, height = image.size
        found: dict[int, list[Box]] = {}
        for item in self._objects(path):
            name = item.findtext("name", "")
            if name in self.classes:
                try:
                    left, top, right, bottom = (
                        float(item.findtext(f"bndbox/{side}", ""))
                        for side in ("xmin", "ymin", "xmax", "ymax")
                    )
                except ValueError as error:
                    raise InputError(f"{path}: an object without a box; restore it") from error
                # VOC counts pixels from 1, and the last one belongs to the box.
                box = ((left - 1) / width, (top - 1) / height, right / width, bottom / height)
                found.setdefault(self.classes.index(name), []).append(box)
        return found

    def instances(self, picture: Picture) -> TrueInstances | None:
        """The objects of ``SegmentationObject/<id>.png``, whose classes SegmentationClass tells.

        Raises:
            InputError: A mask cannot be read, or the two differ in size.
        """
        path = self.root / "SegmentationObject" / f"{picture.id}.png"
        classes = self.mask(picture)
        if classes is None or not path.is_file():
            return None
        objects = read_mask(path, IGNORED - 1)
        if objects.shape != classes.shape:
            raise InputError(
                f"{path}: {objects.shape[1]}x{objects.shape[0]} pixels, {picture.mask_path} has "
                f"{classes.shape[1]}x{classes.shape[0]}; restore both"
            )
        labels, masks = [], []
        for number in np.unique(objects[(objects > 0) & (objects != IGNORED)]).tolist():
            mask = objects == number
            value = int(np.bincount(classes[mask]).argmax())
            if value not in (0, IGNORED):  # which the classes that are not chosen are
                labels.append(value - 1)
                masks.append(mask)
        return TrueInstances(labels, masks, [False] * len(masks), objects == IGNORED)

    def _objects(self, path: Path) -> list[ElementTree.Element]:
        """The objects of an annotation file that give labels."""
        try:
            objects = list(ElementTree.parse(path).iter("object"))
        except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
            raise InputError(f"{path}: not a readable annotation ({error}); restore it") from error
        return [
            item
            for item in objects
            if self.difficult or item.findtext("difficult", "0").strip() != "1"
        ]

    def _labels(self, path: Path) -> tuple[int, ...]:
        names = {item.findtext("name", "") for item in self._objects(path)}
        unknown = names.difference(self.tree_classes)
        if unknown:
            raise InputError(f"{path}: unknown class {min(unknown)!r}; known: {self.tree_classes}")
        return tuple(index for index, name in enumerate(self.classes) if name in names)


def _read_ids(path: Path) -> list[str]:
    """Names of pictures from the lines of a list: the first word, without folder and suffix."""
    ids: dict[str, int] = {}
    for number, line in enumerate(read_lines(path, "restore it"), 1):
        words = line.split()
        if not words:
            continue
        image_id = re.sub(r"^.*/|\.(jpg|png)$", "", words[0])
        check_name(image_id, f"{path} line {number}")
        if image_id in ids:
            raise InputError(
                f"{path} line {number}: {image_id} is listed already in line {ids[image_id]}; "
                "remove one"
            )
        ids[image_id] = number
    if not ids:
        raise InputError(f"{path}: the split is empty; list at least one picture")
    return list(ids)
