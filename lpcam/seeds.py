"""The seed record, the one format that every producer and consumer of maps shares.

``<id>.npz`` holds ``keys`` (L,) int64, the class indices, ``maps`` (L, h, w) float16 in 0..1 on the
stride-4 grid, refined ones on any, and ``size`` (2,) int64, the picture's height and width. Never
pickled. ``np.load`` reads it.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.arrays import DAMAGE, read_arrays
from lpcam.errors import InputError
from lpcam.store import write_atomically

# Maps are stored in multiples of this, at most 0.001 off: a tenth of the step between the
# thresholds that they are scored at. The digits below are noise, and noise does not compress.
STEP = 2**-9


@dataclass(frozen=True)
class Seed:
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


def save_seed(path: Path, seed: Seed) -> None:
    """Write a seed record, its maps rounded to multiples of :data:`STEP`."""
    arrays: dict[str, np.ndarray] = {
        "keys": seed.keys.astype(np.int64),
        "maps": (np.round(seed.maps.astype(np.float32) / STEP) * STEP).astype(np.float16),
        "size": np.array(seed.size, np.int64),
    }
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            entry = ZipInfo(f"{name}.npy")  # of a fixed date: equal maps make equal files
            # np.savez_compressed knows deflate only, which finds strings of bytes that come again;
            # numbers of two bytes bzip2 makes a third smaller.
            entry.compress_type = ZIP_BZIP2 if name == "maps" else ZIP_STORED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def load_seed(path: Path) -> Seed:
    """Read a seed record.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        arrays = read_arrays(path)
        height, width = (int(side) for side in arrays["size"])
        return Seed(arrays["keys"], arrays["maps"], (height, width))
    except DAMAGE as error:
        raise InputError(f"{path}: not a readable seed record ({error}); delete it") from error


def seed_mask(maps: Tensor, keys: np.ndarray, background: float) -> np.ndarray:
    """Turn maps into a mask: the strongest class where it exceeds a constant background score.

    Args:
        maps: Maps ``(L, H, W)`` in 0..1.
        keys: Class indices ``(L,)``.
        background: The score that a class has to exceed.

    Returns:
        Mask ``(H, W)`` uint8: 0 background, class index + 1 elsewhere.
    """
    if not len(maps):
        return np.zeros(maps.shape[1:], np.uint8)
    score, best = maps.max(0)
    labels = torch.as_tensor(keys + 1, dtype=torch.uint8)[best]
    return torch.where(score > background, labels, 0).numpy()


def mark_unsure(mask: np.ndarray, maps: Tensor, background: float, band: float) -> np.ndarray:
    """Set pixels of a mask to 255 where the strongest score is close to the background score.

    Args:
        mask: Mask ``(H, W)`` from :func:`seed_mask`.
        maps: The maps ``(L, H, W)`` it was made from.
        background: The background score it was made with.
        band: How far from it a score has to be to count as sure; 0 marks nothing.

    Returns:
        A new mask ``(H, W)`` uint8.
    """
    if not len(maps):
        return mask
    sure = (maps.amax(0) - background).abs().numpy() >= band
    return np.where(sure, mask, 255).astype(np.uint8)


def scores_of_labels(maps: Tensor, labels: Tensor) -> Tensor:
    """Scores whose mask at background 0.5 is given: for rules that decide labels, not scores.

    Each map is halved, and the map of a pixel's label lifted by 0.5, so that a sweep over other
    thresholds still tells strong from weak. The label holds in float16, as records are stored.

    Args:
        maps: Maps in 0..1 ``(L, H, W)``.
        labels: ``(H, W)``, integers: 0 background, place among the L maps + 1 elsewhere.

    Returns:
        Scores ``(L, H, W)`` in 0..1.
    """
    wins = torch.arange(1, len(maps) + 1)[:, None, None] == labels
    # Above 0.5, float16 goes in steps of 2^-11.
    return torch.where(wins, 0.5 + (maps / 2).clamp_min(2**-11), maps / 2)


def palette() -> list[int]:
    """The colours of VOC's masks: 256 RGB triples, each bit of a label spread over the channels."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        channel, shift = bit % 3, 7 - bit // 3
        colours[:, channel] |= (((np.arange(256) >> bit) & 1) << shift).astype(np.uint8)
    return [int(value) for value in colours.flatten()]


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask ``(H, W)`` uint8 as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
