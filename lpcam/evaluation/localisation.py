"""Scores of activation maps as localisation: MaxBoxAccV2 and PxAP, for any maps.

From Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, who
score pictures of one class. Here each pair of a picture and a class of its label counts by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from lpcam.evaluation.segmentation import IGNORED

SIDE = 224  # pixels that maps, masks and boxes are resized to
OVERLAPS = (0.3, 0.5, 0.7)
# Thresholds of MaxBoxAcc on maps of 256 grey levels, and steps between those of PxAP.
LEVELS = np.unique((np.arange(100) / 100 * 255).astype(int))
BINS = 1000


@dataclass(frozen=True, eq=False)
class LocalisationCounts:
    """What one or many pairs of a picture and a class count; they add up.

    Attributes:
        hits: Pairs of which a box is found, by threshold and overlap ``(len(LEVELS), 3)`` int64.
        boxed: Pairs with a true box.
        pixels: Pixels ``(C, 2, BINS + 1)`` int64 by class, whether they show it, and score.
    """

    hits: np.ndarray
    boxed: int
    pixels: np.ndarray

    def __add__(self, other: "LocalisationCounts") -> "LocalisationCounts":
        """The counts of both."""
        return LocalisationCounts(
            self.hits + other.hits, self.boxed + other.boxed, self.pixels + other.pixels
        )

    @classmethod
    def zero(cls, num_classes: int) -> "LocalisationCounts":
        """Those of no pair."""
        return cls(
            np.zeros((len(LEVELS), len(OVERLAPS)), np.int64),
            0,
            np.zeros((num_classes, 2, BINS + 1), np.int64),
        )

    def metrics(self) -> dict[str, float]:
        """The scores, fractions in 0..1; those that nothing defines are left out.

        Returns:
            ``max_box_acc_v2``, the mean over overlaps of the share of pairs with a box that
            overlaps a true one so much, each at its own best threshold; and ``pxap``, the mean over
            classes of the average precision of their pixels.
        """
        values = {}
        if self.boxed:
            values["max_box_acc_v2"] = float((self.hits.max(0) / self.boxed).mean())
        shown = [counts for counts in self.pixels if counts[1].any()]
        if shown:
            values["pxap"] = float(np.mean([_average_precision(counts) for counts in shown]))
        return values


def count_pair(
    scores: np.ndarray,
    index: int,
    num_classes: int,
    mask: np.ndarray | None,
    boxes: Sequence[Sequence[float]],
) -> LocalisationCounts:
    """Count one pair of a picture and a class.

    Args:
        scores: The class's map ``(h, w)``, of any resolution; it is stretched to 0..1.
        index: The class.
        num_classes: Number of classes C.
        mask: True labels ``(H, W)`` uint8: 0 background, class index + 1, 255 ignored. None leaves
            the pixels out.
        boxes: The true boxes of the class, shares of the picture's width and height: left, top,
            right, bottom. None of them leaves the boxes out.
    """
    counts = LocalisationCounts.zero(num_classes)
    rows = torch.from_numpy(scores.astype(np.float32))[None, None]
    small = F.interpolate(rows, (SIDE, SIDE), mode="bilinear")[0, 0].numpy()
    small = small - small.min()
    small /= max(float(small.max()), 1e-12)
    if len(boxes):
        true = np.minimum(np.array(boxes) * SIDE, SIDE - 1).astype(int)
        grey = (255 * small).astype(np.uint8)
        for place, level in enumerate(LEVELS):
            found = contour_boxes(grey > level)
            best = _overlap(found, true).max() if len(found) else 0.0
            counts.hits[place] += best >= np.array(OVERLAPS)
    if mask is not None:
        nearest = [np.arange(SIDE) * length // SIDE for length in mask.shape]
        seen = mask[np.ix_(*nearest)]
        known = seen != IGNORED
        step = (small[known] * BINS).astype(int)
        shows = (seen[known] == index + 1).astype(int)
        counts.pixels[index] = np.bincount(
            shows * (BINS + 1) + step, minlength=2 * (BINS + 1)
        ).reshape(2, BINS + 1)
    return LocalisationCounts(counts.hits, int(len(boxes) > 0), counts.pixels)


def contour_boxes(region: np.ndarray) -> np.ndarray:
    """Boxes of all contours of a region: around its parts, and around the holes in them.

    Parts hang together across corners, holes do not. As in the published code a box reaches one
    pixel further to the right and below than its contour, within the picture.

    Args:
        region: ``(H, W)`` bool.

    Returns:
        Boxes ``(n, 4)`` int: left, top, right, bottom pixel, the last two belong to them.
    """
    found = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for rows, columns in ndimage.find_objects(ndimage.label(region, np.ones((3, 3)))[0])
    ]
    height, width = region.shape
    for rows, columns in ndimage.find_objects(ndimage.label(~region)[0]):
        inside = rows.start and columns.start and rows.stop < height and columns.stop < width
        if inside:  # its contour are the pixels around it
            found.append((columns.start - 1, rows.start - 1, columns.stop + 1, rows.stop + 1))
    boxes = np.array(found, int).reshape(-1, 4)
    return np.minimum(boxes, [width - 1, height - 1, width - 1, height - 1])


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union ``(n, m)`` of boxes ``(n, 4)`` and ``(m, 4)``."""
    a, b = boxes[:, None], others[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    both = sides.clip(0).prod(-1)
    area, other = ((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b))
    return both / (area + other - both)


def _average_precision(counts: np.ndarray) -> float:
    """Of pixel counts ``(2, bins)`` by truth and score: sum of precision times gain in recall."""
    false, true = counts[:, ::-1].cumsum(1)
    precision = true / np.maximum(true + false, 1)
    return float((precision * np.diff(true, prepend=0)).sum() / true[-1])
