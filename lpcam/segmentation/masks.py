"""The masks that a network learns from: those of a run, or the data set's own."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpcam.data.dataset import IGNORED, Picture, SegmentationDataset, open_image, read_mask
from lpcam.data.files import abbreviate, missing_files
from lpcam.errors import InputError
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.seeds.record import load_seed
from lpcam.storage.hashing import digest, file_digest
from lpcam.storage.parallel import for_each

TRUTH = "truth"


class Masks(ABC):
    """Labels of pixels for the pictures of a data set."""

    @abstractmethod
    def read(self, picture: Picture) -> np.ndarray:
        """The mask ``(H, W)`` uint8: 0 background, class index + 1, 255 unknown.

        Raises:
            InputError: There is none, or it cannot be read.
        """

    @abstractmethod
    def digest(self, pictures: Sequence[Picture]) -> str:
        """Hash what all these masks hold.

        Raises:
            InputError: A picture has none.
        """

    def confidence(self, picture: Picture) -> np.ndarray:
        """How far each pixel's label is believed ``(H, W)`` uint8, 255 for fully."""
        return np.full_like(self.read(picture), 255)

    def confidence_digest(self, pictures: Sequence[Picture]) -> str:
        """Hash what :meth:`confidence` is made from."""
        return ""


class TrueMasks(Masks):
    """The data set's own masks: full supervision, the ceiling of what pseudo masks can give.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def read(self, picture: Picture) -> np.ndarray:  # noqa: D102 - inherited
        mask = self.dataset.mask(picture)
        if mask is None:
            raise InputError(f"masks={TRUTH}: {picture.id} has no mask; name a run's folder")
        return mask

    def digest(self, pictures: Sequence[Picture]) -> str:  # noqa: D102 - inherited
        found = {picture.id: self.dataset.mask_digest(picture) for picture in pictures}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise InputError(
                f"masks={TRUTH}: {len(missing)} of {len(found)} pictures have no mask "
                f"({abbreviate(missing)}); name a run's folder instead"
            )
        return digest(found)


class PseudoMasks(Masks):
    """The masks of a run of ``infer.py``, or a folder of ``<id>.png``.

    Args:
        folder: The run's folder, which holds ``masks``, or the masks' own.
        classes: Names of the data set's classes.

    Raises:
        InputError: There is no such folder, or its masks are of other classes.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.run = folder
        self.folder = folder / "masks" if (folder / "masks").is_dir() else folder
        self.num_classes = len(classes)
        if not self.folder.is_dir():
            raise InputError(
                f"masks={folder}: no such folder; name a run of infer.py, or {TRUTH} for the data "
                "set's own masks"
            )
        prototypes = folder / "prototypes.safetensors"
        if prototypes.is_file():
            theirs = Prototypes.load(prototypes).classes
            if theirs != tuple(classes):
                raise InputError(
                    f"masks={folder}: of the classes {abbreviate(theirs)}, the data set has "
                    f"{abbreviate(classes)}; give a run on the same classes in the same order"
                )

    def path(self, picture: Picture) -> Path:
        """The mask's file."""
        return self.folder / f"{picture.id}.png"

    def read(self, picture: Picture) -> np.ndarray:  # noqa: D102 - inherited
        return read_mask(self.path(picture), self.num_classes)

    def digest(self, pictures: Sequence[Picture]) -> str:  # noqa: D102 - inherited
        self._require(self.folder, [f"{picture.id}.png" for picture in pictures])
        return digest({p.id: file_digest(self.path(p)) for p in pictures})

    def confidence(self, picture: Picture) -> np.ndarray:
        """How far each pixel's label is believed ``(H, W)`` uint8, 255 for fully.

        A class's pixel has its score in the maps that the mask was made from, a pixel of background
        what the strongest score lacks of 1.
        """
        mask = self.read(picture)
        seed = load_seed(self._maps / f"{picture.id}.npz")
        belief = np.zeros(seed.size, np.float32)
        if mask.shape != seed.size:
            raise InputError(f"{self.path(picture)}: of another size than its maps; run again")
        scores = seed.full_size().numpy()
        belief[mask == 0] = 1 - (scores.max(0)[mask == 0] if len(scores) else 0)
        for key, score in zip(seed.keys, scores, strict=True):
            belief[mask == key + 1] = score[mask == key + 1]
        return np.round(255 * belief.clip(0, 1)).astype(np.uint8)

    def confidence_digest(self, pictures: Sequence[Picture]) -> str:  # noqa: D102 - inherited
        self._require(self._maps, [f"{picture.id}.npz" for picture in pictures])
        return digest({p.id: file_digest(self._maps / f"{p.id}.npz") for p in pictures})

    @property
    def _maps(self) -> Path:
        """The maps that the masks were made from: refined ones where there are any."""
        refined = self.run / "refined"
        return refined if refined.is_dir() else self.run / "maps"

    def _require(self, folder: Path, names: Sequence[str]) -> None:
        lacks = missing_files(folder, names)
        if lacks:
            raise InputError(
                f"masks={self.run}: {lacks}; name the split among dataset.map_splits of that run, "
                "and leave save=shown out"
            )


def open_masks(choice: str, dataset: SegmentationDataset) -> Masks:
    """The masks that a setting names.

    Args:
        choice: A folder, or ``truth``.
        dataset: The data set.

    Raises:
        InputError: There is no such folder, or its masks are of other classes.
    """
    if choice == TRUTH:
        return TrueMasks(dataset)
    return PseudoMasks(Path(choice).expanduser(), dataset.classes)


def usable(masks: Masks, pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures of which at least one pixel is known.

    Args:
        masks: Their masks, each of which is read.
        pictures: The pictures.

    Raises:
        InputError: A mask cannot be read or has another size than its picture, or no pixel of any
            is known.
    """
    known: set[str] = set()
    adding = threading.Lock()

    def look(picture: Picture) -> None:
        mask = masks.read(picture)
        with open_image(picture.path, decode=False) as image:
            size = image.size
        if mask.shape[::-1] != size:
            raise InputError(
                f"{picture.id}: mask of {mask.shape[1]}x{mask.shape[0]} pixels, picture of "
                f"{size[0]}x{size[1]}; give its own mask"
            )
        if (mask != IGNORED).any():
            with adding:
                known.add(picture.id)

    for_each(look, pictures, "Reading masks")
    if not known:
        raise InputError(
            f"masks: no sure pixel in the {len(pictures)} masks, all are 255; lower "
            "thresholds.unsure_band of that run"
        )
    return [picture for picture in pictures if picture.id in known]
