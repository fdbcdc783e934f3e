"""A background score from maps and pictures alone, for users without masks.

A mask is good where it parts a picture into regions that are each of one colour. So a score is good
at which the two sides of the strongest map, object and background, leave little variance of colour:
Otsu's criterion (IEEE Trans. SMC, 1979) over the picture's colours, with the map for what is on
which side, as in the two-phase model of Chan and Vese (IEEE Trans. Image Processing, 2001).
Pictures count alike: each one's curve is divided by its maximum before the mean is taken. Without
that, few pictures of one colour on another decide.

The curve is flat, and its highest point says little: for maps of one scale it lies at 0. So the
middle of its upper tenth is taken; experiments/voc_animals.md has what that loses, and what the
highest point would.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lpcam.seeds.record import SeedRecord

STEPS = 100
LEAST = 0.01  # share of a picture that each side has to have
UPPER = 0.1  # share of the curve's height within which scores are as good as the best


def colours(image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """A picture's colours on the grid of its maps.

    Args:
        image: The picture, RGB.
        grid: Rows and columns of the maps.

    Returns:
        Differences from the mean colour, a column a cell ``(3, h * w)``.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    found = F.interpolate(pixels[None], grid, mode="bilinear", antialias=True, align_corners=False)
    cells = found[0].flatten(1)
    return (cells - cells.mean(1, keepdim=True)).numpy()


def parting(cells: np.ndarray, seed: SeedRecord) -> np.ndarray | None:
    """How well each background score parts a picture's colours, 1 at the best.

    Args:
        cells: From :func:`colours`.
        seed: The picture's maps.

    Returns:
        :func:`explained_colour` divided by its maximum ``(101,)``; None where nothing is parted.
    """
    explained = explained_colour(cells, seed)
    if explained is None or not explained.any():
        return None
    return explained / explained.max()


def explained_colour(cells: np.ndarray, seed: SeedRecord) -> np.ndarray | None:
    """Share of a picture's variance of colour that each background score explains.

    Args:
        cells: From :func:`colours`.
        seed: The picture's maps.

    Returns:
        For the scores 0, 0.01, ..., 1 the variance between the two sides as a share of the whole
        ``(101,)``, 0 where one side has nearly nothing; None for a picture without maps or colours.
    """
    variance = float((cells**2).sum())
    if not len(seed.maps) or variance == 0:
        return None
    level = _levels(seed)
    sums = np.stack([np.bincount(level, row, STEPS + 2) for row in cells])
    inside = _exceeding(level)
    total = sums[:, :0:-1].cumsum(1)[:, ::-1]
    outside = level.size - inside
    enough = np.minimum(inside, outside) >= LEAST * level.size
    # Both sides' sums cancel, for the colours' mean is 0.
    between = (total**2).sum(0) * level.size / np.maximum(inside * outside, 1)
    return np.where(enough, between / variance, 0)


def foreground_shares(seed: SeedRecord) -> np.ndarray:
    """Share of a picture that exceeds each of the background scores 0, 0.01, ..., 1: ``(101,)``."""
    if not len(seed.maps):
        return np.zeros(STEPS + 1)
    return _exceeding(_levels(seed)) / seed.maps[0].size


def chosen_score(parted: np.ndarray) -> float:
    """The middle of the background scores that part nearly as well as the best.

    Args:
        parted: Sum over pictures of :func:`parting` ``(101,)``.
    """
    good = np.flatnonzero(parted >= (1 - UPPER) * parted.max())
    return round((good[0] + good[-1]) / 2) / STEPS


def _levels(seed: SeedRecord) -> np.ndarray:
    """How many of the scores lie below the strongest map, cell by cell."""
    strongest = seed.maps.astype(np.float32).max(0)
    return np.clip(np.ceil(strongest * STEPS), 0, STEPS + 1).astype(np.int64).ravel()


def _exceeding(level: np.ndarray) -> np.ndarray:
    """Cells that exceed each score; one with n scores below it does so for the first n."""
    return np.bincount(level, minlength=STEPS + 2)[:0:-1].cumsum()[::-1]
