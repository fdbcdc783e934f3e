"""A user's own pictures: a folder of images, a table of labels, and masks if there are any."""

import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic

from lpcam.data.dataset import IGNORED, Picture, SegmentationDataset
from lpcam.data.files import abbreviate, check_name, file_names, missing_files, read_lines
from lpcam.errors import InputError
from lpcam.settings import CHECKED, Text

HEADER = ["id", "split", "labels"]
SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png")


class Folder(SegmentationDataset):
    """Pictures of any size and any number of classes, in a layout that is quickly made.

    * ``images/<id>.jpg`` or ``.png``
    * ``classes.txt``: a class name a line, without spaces
    * ``labels.csv``: the header ``id,split,labels``, then a picture a line; split is train or
      val, and labels are class names with spaces between them, or nothing
    * ``masks/<id>.png``, for as many pictures as there are masks: 0 background, n the n-th class,
      255 ignored

    Args:
        root: The folder that holds those.
        **splits: See :class:`~lpcam.data.dataset.SegmentationDataset`.

    Raises:
        InputError: ``classes.txt`` is missing or wrong.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(self, root: Text | Path, **splits: Any) -> None:
        path = Path(root).expanduser() / "classes.txt"
        super().__init__(root=root, classes=_read_classes(path), **splits)

    def pictures(self, split: str) -> list[Picture]:  # noqa: D102 - inherited
        table = self.root / "labels.csv"
        if split not in SPLITS:
            raise InputError(f"{table}: no split {split!r}; choose from {', '.join(SPLITS)}")
        rows = self._table[split]
        if not rows:
            raise InputError(
                f"{table}: no picture is in {split}; put some in, or name another split in "
                "dataset.train_split, val_split, prototype_split and map_splits"
            )
        images, masks = self.root / "images", self.root / "masks"
        files = {image_id: self._images.get(image_id, f"{image_id}.jpg") for image_id in rows}
        lacks = missing_files(images, list(files.values()))
        if lacks:
            raise InputError(f"{table}: {lacks}; add these files or remove their lines")
        masked = file_names(masks)
        pictures = [
            Picture(
                image_id,
                images / files[image_id],
                labels,
                masks / f"{image_id}.png" if f"{image_id}.png" in masked else None,
            )
            for image_id, labels in rows.items()
        ]
        return self.kept(split, pictures)

    @cached_property
    def _images(self) -> dict[str, str]:
        """The file of every picture by its id."""
        files: dict[str, str] = {}
        for name in sorted(file_names(self.root / "images")):
            path = Path(name)
            if path.suffix.lower() not in SUFFIXES:
                continue
            if path.stem in files:
                raise InputError(
                    f"{self.root / 'images'}: {files[path.stem]} and {name} have one id; "
                    "rename or remove one"
                )
            files[path.stem] = name
        return files

    @cached_property
    def _table(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Labels of every picture by split and id."""
        path = self.root / "labels.csv"
        lines = read_lines(path, f"write one with the header {','.join(HEADER)}")
        reader = csv.reader(lines, strict=True)
        try:
            found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: {error}; correct it") from error
        if not found or found[0][1] != HEADER:
            raise InputError(
                f"{path} line 1: {''.join(lines[:1])!r}; it must be {','.join(HEADER)!r}"
            )
        table: dict[str, dict[str, tuple[int, ...]]] = {split: {} for split in SPLITS}
        for number, row in found[1:]:
            where = f"{path} line {number}"
            if len(row) != len(HEADER):
                raise InputError(f"{where}: {len(row)} columns; give {', '.join(HEADER)}")
            image_id, split, labels = row
            check_name(image_id, where)
            if any(image_id in rows for rows in table.values()):
                raise InputError(f"{where}: {image_id} is listed already; remove one of its lines")
            if split not in SPLITS:
                raise InputError(f"{where}: split {split!r}; choose from {', '.join(SPLITS)}")
            table[split][image_id] = self._indices(labels.split(), where)
        return table

    def _indices(self, names: list[str], where: str) -> tuple[int, ...]:
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise InputError(
                f"{where}: unknown class {unknown[0]!r}; known: {abbreviate(self.classes)}, see "
                f"{self.root / 'classes.txt'}"
            )
        return tuple(sorted({self.classes.index(name) for name in names}))


def _read_classes(path: Path) -> list[str]:
    names = read_lines(path, "dataset.root must be the folder that holds it, with a class a line")
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    for number, name in enumerate(names, 1):
        if len(name.split()) != 1:
            raise InputError(
                f"{path} line {number}: {name!r}; a class needs a name without spaces, because "
                "spaces separate labels; write '_' instead"
            )
        if name in names[: number - 1]:
            raise InputError(f"{path} line {number}: {name} is listed already; remove one")
    if not 2 <= len(names) < IGNORED:
        raise InputError(f"{path}: {len(names)} classes; give 2 to {IGNORED - 1}")
    return names
