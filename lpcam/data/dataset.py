"""What every data set offers: pictures of a split, their image labels, and masks for scoring."""

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
import pydantic
from PIL import ExifTags, Image
from pydantic import Field
from rich.console import Console
from scipy import ndimage

from lpcam.errors import InputError
from lpcam.settings import CHECKED, Names, Text
from lpcam.storage.hashing import digest, file_digest
from lpcam.storage.ranks import is_main_process

IGNORED = 255
# Pillow hands others to programs, as EPS to Ghostscript; a file is what its content says.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
Classes = Annotated[Names, Field(min_length=2, max_length=IGNORED - 1)]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """One picture and what is known about it.

    Attributes:
        id: Name within the data set; also the name of every file made from it.
        path: The image file.
        labels: Indices of the classes it shows, ascending; from image labels, never from masks.
            None where nobody published them, as for VOC's test pictures.
        mask_path: The mask's file, if it has one of its own; for scoring only.
    """

    id: str
    path: Path
    labels: tuple[int, ...] | None
    mask_path: Path | None = None


@dataclass(frozen=True, eq=False)
class TrueInstances:
    """The annotated objects of a picture, for scoring only.

    Attributes:
        labels: Class index of each.
        masks: Where each is ``(H, W)`` bool.
        crowds: Whether each is a crowd: a region of more objects than anybody counted.
        unknown: Pixels ``(H, W)`` bool of which nobody says whose they are.
    """

    labels: Sequence[int]
    masks: Sequence[np.ndarray]
    crowds: Sequence[bool]
    unknown: np.ndarray


class SegmentationDataset(ABC):
    """Pictures with image labels, and masks to score against.

    Args:
        root: The data set's folder.
        classes: Class names, at least two, for prototypes are chosen by comparing classes; a
            class's index is its place here, its mask value that plus one.
        tree_classes: All classes that annotations and mask files know, in the order of the files'
            values, where ``classes`` is a choice of them; by default the same.
        train_split: The split the classifier learns from.
        val_split: The split that its accuracy is measured on.
        prototype_split: The split whose local features are clustered.
        map_splits: The splits for which maps are made and scored.
        on_error: What :meth:`prepare` does about pictures and masks that cannot be used: ``stop``
            leaves them to whoever comes upon them, which ends the run; ``skip`` reads them all,
            leaves out those that are broken, and says so.

    Attributes:
        skipped: By split, the ids of the pictures that were left out, and why.

    Raises:
        InputError: A class is none of the tree's.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        classes: Classes,
        *,
        tree_classes: Classes | None = None,
        train_split: Text = "train",
        val_split: Text = "val",
        prototype_split: Text = "train",
        map_splits: Names = ("train", "val"),
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.root = Path(root).expanduser()
        self.classes = tuple(classes)
        self.tree_classes = self.classes if tree_classes is None else tuple(tree_classes)
        unknown = [name for name in self.classes if name not in self.tree_classes]
        if unknown:
            raise InputError(
                f"dataset.classes: no class {unknown[0]!r} among {', '.join(self.tree_classes)}; "
                "correct it, or name all classes of a tree of your own in dataset.tree_classes"
            )
        self.train_split = train_split
        self.val_split = val_split
        self.prototype_split = prototype_split
        self.map_splits = tuple(map_splits)
        self.on_error = on_error
        self.skipped: dict[str, dict[str, str]] = {}

    @property
    def chosen(self) -> bool:
        """Whether the classes are a choice of those that the tree has."""
        return len(self.classes) < len(self.tree_classes)

    @property
    def used_splits(self) -> tuple[str, ...]:
        """Every split that the settings name, each once."""
        named = (self.train_split, self.val_split, self.prototype_split, *self.map_splits)
        return tuple(dict.fromkeys(named))

    def prepare(self, *, labelled: bool = True) -> None:
        """Make sure that every split in use can be read, before anything is computed.

        Opens lists, annotations and folders, but no picture and no mask unless broken ones are to
        be left out.

        Args:
            labelled: Whether every picture needs image labels, as maps do; a segmentation network
                does not.

        Raises:
            InputError: Something is missing or wrong, or every picture of a split is broken.
        """
        for split in self.used_splits:
            if self.on_error == "skip":
                self._leave_out(split)
            pictures = self.pictures(split)
            if labelled:
                multi_hot(pictures, len(self.classes))

    def _leave_out(self, split: str) -> None:
        """Find the pictures of a split that are broken, and say how many there are."""
        listed = self.pictures(split)
        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(lambda picture: self.look(picture)[2], listed))
        found = {p.id: text for p, text in zip(listed, problems, strict=True) if text}
        if not found:
            return
        first = next(iter(found.values()))
        if len(found) == len(listed):
            raise InputError(f"dataset.on_error=skip: every picture of {split} is broken: {first}")
        self.skipped[split] = found
        if is_main_process():
            print(
                f"warning: {split}: {len(found)} of {len(listed)} pictures left out: {first}",
                file=sys.stderr,
            )

    def kept(self, split: str, listed: list[Picture]) -> list[Picture]:
        """Those of a split's pictures that were not left out."""
        skipped = self.skipped.get(split, {})
        return [picture for picture in listed if picture.id not in skipped]

    def look(self, picture: Picture) -> tuple[Image.Image | None, np.ndarray | None, str]:
        """Read a picture and its mask; the third value is what is wrong with them, or nothing."""
        image, mask = None, None
        try:
            image = open_picture(picture.path)
            mask = self.mask(picture)
        except InputError as error:
            return image, mask, str(error)
        if mask is not None and mask.shape[::-1] != image.size:
            problem = (
                f"{picture.path}: picture of {image.width}x{image.height} pixels, mask of "
                f"{mask.shape[1]}x{mask.shape[0]}; give it its own mask"
            )
            return image, mask, problem
        return image, mask, ""

    @abstractmethod
    def pictures(self, split: str) -> list[Picture]:
        """The pictures of a split, in the data set's order, without those that were left out.

        Raises:
            InputError: The split is missing, empty or names a file that is not there.
        """

    def mask(self, picture: Picture) -> np.ndarray | None:
        """The true mask ``(H, W)`` uint8 (0 background, class index + 1, 255 ignored), or None.

        Raises:
            InputError: The mask cannot be read, is no 8-bit palette or greyscale image, or holds
                a number that is no class's.
        """
        if picture.mask_path is None:
            return None
        mask = read_mask(picture.mask_path, len(self.tree_classes))
        if self.classes == self.tree_classes:
            return mask
        values = np.full(IGNORED + 1, IGNORED, np.uint8)
        values[0] = 0
        for index, name in enumerate(self.classes):
            values[self.tree_classes.index(name) + 1] = index + 1
        return values[mask]

    def boxes(self, picture: Picture) -> dict[int, list[Box]]:
        """The true boxes of a picture's objects by class, for scoring only.

        By default those around the connected parts of its mask.

        Returns:
            Left, top, right and bottom as shares of the picture's width and height; none for a
            picture of which they are not known.
        """
        mask = self.mask(picture)
        if mask is None:
            return {}
        height, width = mask.shape
        found = {}
        for index in np.unique(mask[(mask > 0) & (mask != IGNORED)]).tolist():
            parts = ndimage.find_objects(ndimage.label(mask == index, np.ones((3, 3)))[0])
            found[index - 1] = [
                (x.start / width, y.start / height, x.stop / width, y.stop / height)
                for y, x in parts
            ]
        return found

    def instances(self, picture: Picture) -> TrueInstances | None:
        """The true masks of a picture's objects of these classes, or None where nobody drew them.

        Raises:
            InputError: They cannot be read.
        """
        return None

    def coco_ids(self, picture: Picture) -> tuple[int | str, Sequence[int]]:
        """The picture and each of the classes as COCO's files call them."""
        return picture.id, range(1, len(self.classes) + 1)

    def mask_digest(self, picture: Picture) -> str | None:
        """Hash of what :meth:`mask` gives, or None without a mask."""
        if not picture.mask_path:
            return None
        found = file_digest(picture.mask_path)
        return found if self.classes == self.tree_classes else digest([found, self.classes])


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """Read a mask ``(H, W)`` uint8: 0 background, class index + 1, 255 ignored.

    Raises:
        InputError: It cannot be read, is no 8-bit palette or greyscale image, or holds a number
            that is no class's.
    """
    with open_image(path) as image:
        # One bit a pixel is refused too: 1 may mean the first class, or white, which is 255.
        if image.mode not in ("P", "L"):
            raise InputError(
                f"{path}: mask of mode {image.mode}; save class numbers as an 8-bit palette or "
                "greyscale PNG"
            )
        mask = np.asarray(image)
    unknown = mask[(mask > num_classes) & (mask != IGNORED)]
    if unknown.size:
        raise InputError(
            f"{path}: holds {unknown[0]}, but there are {num_classes} classes; correct it, or mark "
            "unknown pixels 255"
        )
    return mask


def known_classes(classes: Classes | None, published: Classes) -> Classes:
    """The classes of a tree of which only a choice is named, or none.

    Args:
        classes: The choice.
        published: The classes of the data set as it is distributed.

    Returns:
        Those, or the choice itself if it shares no name with them: the tree is one of its own.
    """
    if classes is None or not set(classes).isdisjoint(published):
        return published
    return classes


def keep_labelled(pictures: Sequence[Picture], source: str) -> list[Picture]:
    """Leave out pictures that show none of the classes, and say how many there were.

    Args:
        pictures: Pictures of a split; one whose labels are not known stays.
        source: Where they are listed, for messages.

    Raises:
        InputError: None is left.
    """
    kept = [picture for picture in pictures if picture.labels != ()]
    if not kept:
        raise InputError(f"{source}: no picture shows a class of dataset.classes; choose others")
    if len(kept) < len(pictures) and is_main_process():
        Console(stderr=True, soft_wrap=True, markup=False).print(
            f"{source}: {len(pictures) - len(kept)} of {len(pictures)} pictures left out, which "
            "show none of the chosen classes"
        )
    return kept


def open_image(path: Path | IO[bytes], *, decode: bool = True) -> Image.Image:
    """Open an image file.

    Args:
        path: The file, or its bytes opened.
        decode: Read the pixels too, so that damage is found here.

    Raises:
        InputError: The file is missing, damaged or no image.
    """
    try:
        image = Image.open(path, formats=FORMATS)
        if decode:
            image.load()
    except Exception as error:  # of a dozen kinds, from the decoders' parts
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({why}); restore or remove it") from error
    return image


def open_picture(path: Path | IO[bytes]) -> Image.Image:
    """Open a picture as RGB, whatever it is stored as.

    An EXIF rotation is ignored: masks and boxes belong to the pixels as they are stored.

    Raises:
        InputError: The file is missing, damaged, no image, or has more than 8 bits a channel.
    """
    image = open_image(path)
    if image.mode[0] in "IF":
        raise InputError(f"{path}: picture of mode {image.mode}; convert it to 8 bits a channel")
    return image.convert("RGB")


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of a picture ask for it to be turned or mirrored."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1)) != 1
    except Exception:  # damaged ones end in errors of all kinds
        return False


def fingerprint(pictures: Sequence[Picture]) -> str:
    """Hash what a computation sees of these pictures: ids, labels, and the files' size and time.

    Reading every byte would cost more than some stages do; a file that changes gets a new time. One
    that is touched or copied gets one too: that makes a stage again, which costs time, where hashes
    of contents would need a list of them to be kept whole beside every data set.
    """
    rows = []
    for picture in pictures:
        stat = picture.path.stat()
        rows.append((picture.id, picture.labels, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def multi_hot(pictures: Sequence[Picture], num_classes: int) -> np.ndarray:
    """Image labels as an array ``(N, C)`` float32 of zeros and ones.

    Raises:
        InputError: A picture's labels are not known.
    """
    labels = np.zeros((len(pictures), num_classes), np.float32)
    for row, picture in enumerate(pictures):
        if picture.labels is None:
            raise InputError(
                f"{picture.path}: has no image labels, as VOC publishes none for test; training, "
                "clustering and maps need them, so use another split"
            )
        labels[row, list(picture.labels)] = 1
    return labels
