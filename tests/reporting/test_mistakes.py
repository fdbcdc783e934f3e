"""What the report says of mistakes, against counts made by hand."""

import numpy as np
import pytest
import torch

from lpcam.data.dataset import Picture
from lpcam.evaluation import SegmentationScore
from lpcam.reporting.figures import draw_confusion
from lpcam.reporting.mistakes import (
    class_rows,
    confusion_shares,
    largest_confusions,
    mistakes,
)
from lpcam.reporting.scores import Method

NAMES = ["horse", "person", "boat"]
#        truth: 4 background, 8 horse, 4 person, 2 unknown
TRUTH = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 2, 2, 2, 2, 255, 255]], np.uint8)
#        said: horse takes two pixels of background and one of person; person takes three of horse
SAID = np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2], [0, 1, 0, 1, 2, 2, 0, 1, 2]])


def result():
    total = SegmentationScore(3)
    maps = torch.stack([torch.from_numpy(label == SAID).float() for label in (1, 2)])
    total.update(maps, [0, 1], TRUTH)
    return total.compute()


def test_the_parts_of_a_union_are_those_counted_by_hand():
    found = mistakes(result())
    horse = np.array([4, 2, 1, 1, 3])  # right, background kept, person kept, removed, given away
    person = np.array([2, 0, 3, 1, 1])
    np.testing.assert_allclose(found[:, 0], horse / 11)
    np.testing.assert_allclose(found[:, 1], person / 7)
    assert np.isnan(found[:, 2]).all()
    best = result().best
    np.testing.assert_allclose(found[0, :2], result().iou[best, 1:3])


def test_rows_begin_with_what_loses_most():
    perfect = SegmentationScore(3)
    maps = torch.stack([torch.from_numpy(label == TRUTH).float() for label in (1, 2)])
    perfect.update(maps, [0, 1], TRUTH)
    methods = [
        Method("CAM", {"val": perfect.compute()}, {}),
        Method("LPCAM", {"val": result()}, {}),
    ]
    pictures = [Picture("a", None, (0, 1)), Picture("b", None, (1,)), Picture("c", None, ())]
    rows = class_rows(methods, "val", NAMES, pictures)
    assert [(row.name, row.pictures, row.gain) for row in rows] == [
        ("person", 2, "-71.4"),
        ("horse", 1, "-63.6"),
        ("boat", 0, ""),
    ]
    assert rows[1].iou == ("100.0", "36.4")
    assert rows[1].shares == (("0.0", "18.2"), ("0.0", "9.1"), ("0.0", "9.1"), ("0.0", "27.3"))
    assert rows[2].iou == ("n/a", "n/a")


def test_rows_of_a_confusion_add_up_and_the_largest_is_told():
    shares = confusion_shares(result())
    np.testing.assert_allclose(shares[:3].sum(1), 1)
    assert np.isnan(shares[3]).all()
    np.testing.assert_allclose(shares[1], [1 / 8, 4 / 8, 3 / 8, 0])
    method = Method("LPCAM", {"val": result()}, {})
    assert largest_confusions(method, "val", NAMES) == [
        "horse → person (37.5 %)",
        "person → horse (25.0 %)",
    ]


@pytest.mark.parametrize("count", [3, 60])
def test_a_confusion_is_drawn_with_the_labels_that_occur(count):
    names = [*NAMES, *(f"class {index}" for index in range(3, count))]
    total = SegmentationScore(count)
    total.update(torch.zeros(0, *TRUTH.shape), [], TRUTH)
    method = Method("CAM", {"val": total.compute()}, {})
    figure = draw_confusion([method, method], "val", names)
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown == ["background", "horse", "person"]
