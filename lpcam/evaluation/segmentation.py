"""Scores of activation maps as segmentations, at every background threshold from one histogram.

The prediction at a constant background score t is the strongest class where its score exceeds t.
Which class that is does not depend on t, so counting the pixels by (true label, strongest class,
number of thresholds below its score) holds the confusion matrices of all thresholds at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from lpcam.errors import InputError

IGNORED = 255


class SegmentationScore:
    """Counts pixels picture by picture; :meth:`compute` turns the counts into scores.

    Args:
        num_classes: Foreground classes C.
        bins: Steps between the thresholds 0, 1 / bins, ..., 1.

    Attributes:
        histogram: Pixel counts ``(C + 1, C, bins + 2)`` int64 by true label, strongest class and
            the number of thresholds below its score. The histograms of parts of a split, or of
            several processes, add up to that of the whole, and can be saved with ``np.save``.
    """

    def __init__(self, num_classes: int, bins: int = 100) -> None:
        self.histogram = np.zeros((num_classes + 1, num_classes, bins + 2), np.int64)
        self._thresholds = np.arange(bins + 1) / bins

    def update(self, maps: Tensor, classes: Sequence[int] | np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of one picture and add them; arguments as for :meth:`count`."""
        self.add(self.count(maps, classes, mask), classes)

    def add(self, counts: np.ndarray, classes: Sequence[int] | np.ndarray) -> None:
        """Add what :meth:`count` gave for a picture of these classes."""
        # Without classes all is background, whichever class it is booked under.
        self.histogram[:, list(classes) or [0]] += counts

    def count(
        self, maps: Tensor, classes: Sequence[int] | np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Count the pixels of one picture, without adding them.

        Args:
            maps: Maps ``(L, H, W)`` in 0..1 of the classes that the image label names.
            classes: Their class indices ``(L,)``, each once. Without any, all is predicted
                background.
            mask: True labels ``(H, W)`` uint8: 0 background, class index + 1, 255 ignored.

        Returns:
            Counts ``(C + 1, max(L, 1), bins + 2)`` by true label, place among the classes and the
            number of thresholds below the score.

        Raises:
            InputError: Sizes differ, a class or label is out of range, or a map holds NaN. The
                message does not know the picture's name; the caller adds it.
        """
        num_classes, levels = self.histogram.shape[1:]
        if maps.shape != (len(classes), *mask.shape):
            raise InputError(
                f"maps of shape {tuple(maps.shape)} for {len(classes)} classes and a mask of "
                f"{mask.shape}; make maps and mask from the same picture"
            )
        if len(classes) and max(classes) >= num_classes:
            raise InputError(
                f"maps hold class index {max(classes)}, but there are {num_classes} classes; "
                "score them with the data set they were made from"
            )
        known = mask != IGNORED
        truth = mask[known].astype(np.int64)
        if truth.size and truth.max() > num_classes:
            raise InputError(
                f"the mask holds label {truth.max()}, but there are {num_classes} classes; "
                "mark unknown pixels 255"
            )
        shape = (num_classes + 1, max(len(classes), 1), levels)
        index = truth * (shape[1] * levels)
        if len(classes):
            score, best = maps.float().max(0)
            index += (best * levels + self._level(score).long()).numpy()[known]
        return np.bincount(index, minlength=math.prod(shape)).reshape(shape)

    def _level(self, score: Tensor) -> Tensor:
        """How many thresholds are below each score: a guess, mended where rounding made it wrong.

        Thresholds lie evenly, so this is faster than a search among them.
        """
        if score.numel() and score.max().isnan():
            raise InputError(
                "the maps hold NaN; make them again from a model that has not diverged"
            )
        bins = len(self._thresholds) - 1
        level = (score * bins).ceil().clamp(0, bins + 1)
        level -= ((level - 1) / bins >= score).float()
        level += (level / bins < score).float()
        return level.clamp(0, bins + 1)

    def compute(self) -> "SegmentationResult":
        """Score all pixels counted so far.

        Raises:
            InputError: Not one pixel with a label was counted.
        """
        if not self.histogram.any():
            raise InputError("no pixel to score; the split needs masks that are not all 255")
        # A score with n thresholds below it is foreground at exactly the first n of them.
        foreground = self.histogram[..., :0:-1].cumsum(-1)[..., ::-1]
        background = self.histogram.sum((1, 2))[:, None] - foreground.sum(1)
        confusion = np.concatenate([background[:, None], foreground], 1)
        return SegmentationResult(self._thresholds, confusion.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class SegmentationResult:
    """Scores at each of T background thresholds.

    A class is a foreground class unless said otherwise. What is undefined, such as the precision of
    a class that is never predicted, is NaN and left out of means.

    Attributes:
        thresholds: Background scores ``(T,)``, ascending; one NaN where labels were predicted and
            no threshold made them.
        confusion: Pixel counts ``(T, C + 1, C + 1)`` int64: true label, predicted label.
    """

    thresholds: np.ndarray
    confusion: np.ndarray

    @cached_property
    def _true(self) -> np.ndarray:
        return self.confusion.sum(2)

    @cached_property
    def _predicted(self) -> np.ndarray:
        return self.confusion.sum(1)

    @cached_property
    def _hit(self) -> np.ndarray:
        return np.diagonal(self.confusion, axis1=1, axis2=2)

    @cached_property
    def _union(self) -> np.ndarray:
        return self._true + self._predicted - self._hit

    @cached_property
    def iou(self) -> np.ndarray:
        """Intersection over union ``(T, C + 1)``, background first.

        As in PASCAL VOC, pixels are summed over all pictures first, and a class that is neither in
        the truth nor predicted is NaN.
        """
        return _ratio(self._hit, self._union)

    @cached_property
    def miou(self) -> np.ndarray:
        """Mean IoU ``(T,)`` over background and classes."""
        return _mean(self.iou)

    @cached_property
    def precision(self) -> np.ndarray:
        """Share of a class's predicted pixels that are right ``(T,)``, mean over classes."""
        return _mean(_ratio(self._hit, self._predicted)[:, 1:])

    @cached_property
    def recall(self) -> np.ndarray:
        """Share of a class's true pixels that are found ``(T,)``, mean over classes."""
        return _mean(_ratio(self._hit, self._true)[:, 1:])

    @cached_property
    def fp(self) -> np.ndarray:
        """Over-activation ``(T,)``: false positives / union, mean over classes.

        As defined for IRN (Ahn et al., CVPR 2019), so that fp + fn + IoU = 1 for each class.
        """
        return _mean(_ratio(self._predicted - self._hit, self._union)[:, 1:])

    @cached_property
    def fn(self) -> np.ndarray:
        """Under-activation ``(T,)``: false negatives / union, mean over classes."""
        return _mean(_ratio(self._true - self._hit, self._union)[:, 1:])

    @cached_property
    def best(self) -> int:
        """Index of the threshold with the highest mIoU, the lowest of equals."""
        return int(self.miou.argmax())

    @property
    def threshold_width(self) -> float:
        """How far the threshold may be off: the part of 0..1 with mIoU within 0.01 of the peak.

        Each threshold within it counts for one step, at most 1 in all; of one alone it is NaN.
        """
        if len(self.thresholds) == 1:
            return np.nan
        within = self.miou >= self.miou[self.best] - 0.01
        return min(float(within.sum() / (len(self.thresholds) - 1)), 1.0)

    def index(self, threshold: float) -> int:
        """Index of the threshold nearest to a value."""
        return int(np.abs(self.thresholds - threshold).argmin())

    def miou_at(self, threshold: float) -> float:
        """Mean IoU at the threshold nearest to a value; NaN for none."""
        return np.nan if np.isnan(threshold) else float(self.miou[self.index(threshold)])

    def metrics(self, classes: Sequence[str], threshold: float) -> dict[str, float]:
        """The scores to report, fractions in 0..1.

        Args:
            classes: Names of the C classes.
            threshold: The configured background score; NaN for none.

        Returns:
            ``miou``, ``precision``, ``recall``, ``fp``, ``fn``, ``iou/background`` and
            ``iou/<class>`` at ``best_threshold``, ``miou_at_threshold`` at the configured
            ``threshold``, and ``threshold_width``. Undefined values are left out: it is valid JSON.
        """
        best = self.best
        values = {
            "miou": self.miou[best],
            "best_threshold": self.thresholds[best],
            "threshold": threshold,
            "miou_at_threshold": self.miou_at(threshold),
            "precision": self.precision[best],
            "recall": self.recall[best],
            "fp": self.fp[best],
            "fn": self.fn[best],
            "threshold_width": self.threshold_width,
        }
        for name, value in zip(("background", *classes), self.iou[best], strict=True):
            values[f"iou/{name}"] = value
        return {name: float(value) for name, value in values.items() if not np.isnan(value)}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def _mean(values: np.ndarray) -> np.ndarray:
    return _ratio(np.nansum(values, -1), (~np.isnan(values)).sum(-1))
