"""Scores of full predictions against the oracle that counts pixel by pixel."""

import math

import numpy as np
import pytest

from lpcam.errors import InputError
from lpcam.evaluation import LabelScore
from tests.oracles.segmentation import confusion, scores


def test_counts_and_scores_are_those_of_the_oracle() -> None:
    rng = np.random.default_rng(0)
    total, expected = LabelScore(3), np.zeros((4, 4), np.int64)
    for _ in range(4):
        truth = rng.choice([0, 1, 2, 3, 255], (7, 9)).astype(np.uint8)
        prediction = rng.choice([0, 1, 2, 3, 255], (7, 9)).astype(np.uint8)
        total.update(prediction, truth)
        expected += confusion(truth, np.where(prediction == 255, 0, prediction), 3)
    np.testing.assert_array_equal(total.confusion, expected)
    result = total.compute()
    found = result.metrics(["a", "b", "c"], math.nan)
    assert found["miou"] == pytest.approx(scores(expected)["miou"])
    assert found["recall"] == pytest.approx(scores(expected)["recall"])
    assert not {"best_threshold", "threshold", "miou_at_threshold", "threshold_width"} & set(found)
    assert set(found) >= {"iou/background", "iou/a", "precision", "fp", "fn"}


def test_any_class_may_be_predicted_whatever_the_picture_shows() -> None:
    total = LabelScore(2)
    total.update(np.array([[2, 1]], np.uint8), np.array([[1, 1]], np.uint8))
    np.testing.assert_array_equal(total.compute().iou[0], [np.nan, 0.5, 0.0])


def test_what_does_not_fit_is_refused() -> None:
    total, mask = LabelScore(2), np.zeros((2, 3), np.uint8)
    with pytest.raises(InputError, match="prediction of 4x2 pixels for a mask of 3x2"):
        total.count(np.zeros((2, 4), np.uint8), mask)
    with pytest.raises(InputError, match="the prediction holds label 3, but there are 2"):
        total.count(mask + 3, mask)
    with pytest.raises(InputError, match="the mask holds label 7"):
        total.count(mask, mask + 7)
    total.update(mask, mask + 255)
    with pytest.raises(InputError, match="no pixel to score"):
        total.compute()
