"""Where maps go wrong: each class's mistakes by their kind, from the pixels' confusion."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lpcam.data.dataset import Picture
from lpcam.evaluation.segmentation import SegmentationResult
from lpcam.reporting.scores import Method

# Parts of a class's union, which is its true pixels and those predicted: with the IoU they add up
# to 1.
KINDS = ("context kept", "other class kept", "object removed", "object given away")


@dataclass(frozen=True)
class ClassMistakes:
    """A row of the table.

    Attributes:
        name: The class.
        pictures: How many pictures of the split show it.
        iou: IoU in percent as text, a method each.
        gain: Points of IoU from the first method to the second as text; empty if undefined.
        shares: For each of :data:`KINDS` percent of the union as text, a method each.
    """

    name: str
    pictures: int
    iou: tuple[str, ...]
    gain: str
    shares: tuple[tuple[str, ...], ...]


def mistakes(result: SegmentationResult) -> np.ndarray:
    """Parts of each class's union at the best threshold.

    Returns:
        IoU and then :data:`KINDS` ``(5, C)``; they add up to 1. NaN for a class that is neither in
        the truth nor predicted.
    """
    confusion = result.confusion[result.best].astype(float)
    hit = np.diagonal(confusion)
    between = confusion[1:, 1:] - np.diag(hit[1:])
    counts = np.stack([hit[1:], confusion[0, 1:], between.sum(0), confusion[1:, 0], between.sum(1)])
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(0)


def class_rows(
    methods: Sequence[Method], split: str, classes: Sequence[str], pictures: Sequence[Picture]
) -> list[ClassMistakes]:
    """The table of a split, the class that loses most first.

    Args:
        methods: Two methods, the baseline first.
        split: Which split.
        classes: Names of the C classes.
        pictures: The split's pictures.
    """
    found = [100 * mistakes(method.results[split]) for method in methods]
    gain = found[1][0] - found[0][0]
    shown = [sum(c in (p.labels or ()) for p in pictures) for c in range(len(classes))]
    return [
        ClassMistakes(
            classes[c],
            shown[c],
            tuple(_percent(values[0, c]) for values in found),
            "" if np.isnan(gain[c]) else f"{gain[c]:+.1f}",
            tuple(
                tuple(_percent(values[1 + kind, c]) for values in found)
                for kind in range(len(KINDS))
            ),
        )
        for c in np.argsort(np.nan_to_num(gain, nan=np.inf), kind="stable").tolist()
    ]


def _percent(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.1f}"


def confusion_shares(result: SegmentationResult) -> np.ndarray:
    """Which label the pixels of each label get at the best threshold.

    Returns:
        ``(C + 1, C + 1)``, background first: each row of a true label adds up to 1, or is NaN where
        the truth lacks that label.
    """
    confusion = result.confusion[result.best].astype(float)
    with np.errstate(invalid="ignore"):
        return confusion / confusion.sum(1, keepdims=True)


def largest_confusions(
    method: Method, split: str, classes: Sequence[str], count: int = 3
) -> list[str]:
    """The classes whose pixels most often go to another class of the same picture, in words.

    Args:
        method: The method.
        split: Which split.
        classes: Names of the C classes.
        count: At most so many.
    """
    shares = np.nan_to_num(confusion_shares(method.results[split])[1:, 1:])
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:count]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        f"{classes[i]} → {classes[j]} ({100 * shares[i, j]:.1f} %)"
        for i, j in pairs
        if round(100 * shares[i, j], 1) > 0
    ]
