"""The seed record, the one format that every producer and consumer of maps shares.

``<id>.npz`` holds ``keys`` (L,) int64, the class indices, ``maps`` (L, h, w) float16 in 0..1 on the
stride-4 grid, refined ones on any, and ``size`` (2,) int64, the picture's height and width. Never
pickled. ``np.load`` reads it.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import InputError
from lpcam.storage.arrays import DAMAGE, read_arrays
from lpcam.storage.files import write_atomically
from lpcam.storage.records import Records

# Maps are stored in multiples of this, at most 0.001 off: a tenth of the step between the
# thresholds that they are scored at. The digits below are noise, and noise does not compress.
STEP = 2**-9
LARGE = 10 * 1024  # bytes of a map from which on a smaller file is worth its time


@dataclass(frozen=True)
class SeedRecord:
    """The maps of one picture.

    Attributes:
        keys: Class indices ``(L,)``, int64.
        maps: Maps in 0..1 ``(L, h, w)``: at a quarter of the picture's resolution, or at any other
            when they are refined.
        size: The picture's height and width in pixels.
    """

    keys: np.ndarray
    maps: np.ndarray
    size: tuple[int, int]

    def full_size(self) -> Tensor:
        """The maps at the picture's own size, ``(L, H, W)`` float32, bilinear."""
        maps = torch.from_numpy(self.maps.astype(np.float32))
        if not len(maps):
            return maps.new_zeros(0, *self.size)
        return F.interpolate(maps[None], self.size, mode="bilinear", align_corners=False)[0]


def grid_size(size: tuple[int, int]) -> tuple[int, int]:
    """The stride-4 grid of a picture: ``(H - 1) // 4 + 1`` rows and as many columns for W."""
    return (size[0] - 1) // 4 + 1, (size[1] - 1) // 4 + 1


def save_seed(path: Path, seed: SeedRecord) -> None:
    """Write a seed record into a file of its own, see :func:`seed_bytes`."""
    write_atomically(path, seed_bytes(seed))


def seed_bytes(seed: SeedRecord) -> bytes:
    """The bytes of a seed record, its maps rounded to multiples of :data:`STEP`."""
    arrays: dict[str, np.ndarray] = {
        "keys": seed.keys.astype(np.int64),
        "maps": (np.round(seed.maps.astype(np.float32) / STEP) * STEP).astype(np.float16),
        "size": np.array(seed.size, np.int64),
    }
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            entry = ZipInfo(f"{name}.npy")  # of a fixed date: equal maps make equal files
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            kind = _compression(data.getvalue(), LARGE * max(len(seed.keys), 1))
            archive.writestr(entry, data.getvalue(), kind, compresslevel=1)
    return buffer.getvalue()


def _compression(data: bytes, large: int) -> int:
    """Deflate where that is small enough: it takes a third of the time of bzip2.

    Of numbers of two bytes bzip2 makes a third less.
    """
    return ZIP_DEFLATED if len(zlib.compress(data, 1)) <= large else ZIP_BZIP2


def load_seed(path: Path) -> SeedRecord:
    """Read the file of a seed record.

    Raises:
        InputError: The file is missing or damaged.
    """
    with _seed_of(path):
        return _decoded(path)


def read_seed(records: Records, image_id: str) -> SeedRecord:
    """Read a picture's seed record.

    Raises:
        InputError: It is missing or damaged.
    """
    name = f"{image_id}.npz"
    with _seed_of(records.folder / name), records.open(name) as file:
        return _decoded(file)


def _decoded(file: Path | BinaryIO) -> SeedRecord:
    arrays = read_arrays(file)
    height, width = (int(side) for side in arrays["size"])
    return SeedRecord(arrays["keys"], arrays["maps"], (height, width))


@contextmanager
def _seed_of(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise InputError(f"{path}: not a readable seed record ({error}); delete it") from error
