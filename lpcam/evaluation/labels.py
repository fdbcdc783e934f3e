"""Scores of full predictions: every pixel has a label, and there is no threshold."""

import numpy as np

from lpcam.errors import InputError
from lpcam.evaluation.segmentation import IGNORED, SegmentationResult


class LabelScore:
    """Counts pixels picture by picture; :meth:`compute` turns the counts into scores.

    Args:
        num_classes: Foreground classes C.

    Attributes:
        confusion: Pixel counts ``(C + 1, C + 1)`` int64: true label, predicted label. Those of
            parts of a split add up to that of the whole.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of one picture and add them; arguments as for :meth:`count`."""
        self.confusion += self.count(prediction, mask)

    def count(self, prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Count the pixels of one picture, without adding them.

        Args:
            prediction: Predicted labels ``(H, W)`` uint8 of any classes, whatever the picture
                shows; 255 counts as background, as in IRN's scores of masks with open pixels.
            mask: True labels ``(H, W)`` uint8: 0 background, class index + 1, 255 ignored.

        Returns:
            Counts ``(C + 1, C + 1)``.

        Raises:
            InputError: Sizes differ, or a label is out of range. The message does not know the
                picture's name; the caller adds it.
        """
        if prediction.shape != mask.shape:
            raise InputError(
                f"prediction of {prediction.shape[1]}x{prediction.shape[0]} pixels for a mask of "
                f"{mask.shape[1]}x{mask.shape[0]}; give those of the same picture"
            )
        labels = len(self.confusion)
        known = mask != IGNORED
        truth = mask[known].astype(np.int64)
        found = np.where(prediction == IGNORED, 0, prediction)[known].astype(np.int64)
        for name, values in (("mask", truth), ("prediction", found)):
            if values.size and values.max() >= labels:
                raise InputError(
                    f"the {name} holds label {values.max()}, but there are {labels - 1} classes; "
                    "mark unknown pixels 255"
                )
        return np.bincount(truth * labels + found, minlength=labels**2).reshape(labels, labels)

    def compute(self) -> SegmentationResult:
        """Score all pixels counted so far; the result's one threshold is NaN.

        Raises:
            InputError: Not one pixel with a label was counted.
        """
        if not self.confusion.any():
            raise InputError("no pixel to score; the split needs masks that are not all 255")
        return SegmentationResult(np.array([np.nan]), self.confusion[None])
