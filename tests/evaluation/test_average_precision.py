"""Average precision of instances, by numbers worked out by hand."""

import sys

import numpy as np
import pytest

from lpcam.errors import InputError
from lpcam.evaluation.instances import average_precision, coco_tools, region_entry, region_mask

pytest.importorskip("pycocotools", reason="needs the extra 'coco'")


def region(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[top:bottom, left:right] = True
    return mask


FIRST, SECOND, NOWHERE = region(2, 3, 22, 33), region(30, 5, 50, 25), region(52, 30, 60, 40)


def true(mask: np.ndarray, *, image: int | str = 7, category: int = 3, crowd: int = 0) -> dict:
    where = region_entry(mask)
    return {"image_id": image, "category_id": category, "iscrowd": crowd, **where}


def found(mask: np.ndarray, score: float, *, image: int | str = 7, category: int = 3) -> dict:
    where = region_entry(mask)
    return {"image_id": image, "category_id": category, "score": score, **where}


def test_an_entry_says_where_an_object_is() -> None:
    entry = region_entry(FIRST)
    np.testing.assert_array_equal(region_mask(entry), FIRST)
    assert entry["bbox"] == [2, 3, 20, 30]
    assert entry["area"] == 600


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("image", [7, "2007_000032"])
def test_perfect_instances(kind, image) -> None:
    pixel = region(5, 5, 6, 6)
    truth = [true(mask, image=image) for mask in (FIRST, SECOND, pixel)]
    results = [found(mask, 0.5, image=image) for mask in (FIRST, SECOND, pixel)]
    scores = average_precision(truth, results, kind)
    assert scores == pytest.approx({"ap": 1, "ap50": 1, "ap75": 1})


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_a_mistake_between_two_hits(kind) -> None:
    truth = [true(FIRST), true(SECOND)]
    results = [found(FIRST, 0.9), found(NOWHERE, 0.8), found(SECOND, 0.7)]
    # Precision is 1 up to half of the recall, 51 of 101 points, and 2/3 beyond.
    expected = (51 + 50 * 2 / 3) / 101
    assert average_precision(truth, results, kind)["ap50"] == pytest.approx(expected)


def test_overlap_decides_which_thresholds_are_reached() -> None:
    half = region(2, 3, 22, 21)  # 18 of 30 rows: an overlap of 0.6
    scores = average_precision([true(FIRST)], [found(half, 1.0)], "segm")
    assert scores == pytest.approx({"ap": 0.3, "ap50": 1, "ap75": 0})


def test_one_mask_for_two_objects() -> None:
    truth = [true(FIRST), true(SECOND)]
    scores = average_precision(truth, [found(FIRST | SECOND, 1.0)], "segm")
    assert scores["ap50"] == pytest.approx(51 / 101)  # 600 of 1000 pixels are one of them


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_what_is_found_in_a_crowd_is_no_mistake(kind) -> None:
    crowd = region(28, 0, 60, 40)
    results = [found(SECOND, 0.9), found(FIRST, 0.8)]
    truth = [true(FIRST), true(crowd, crowd=1)]
    assert average_precision(truth, results, kind)["ap50"] == pytest.approx(1)
    assert average_precision(truth[:1], results, kind)["ap50"] == pytest.approx(0.5)


def test_classes_count_the_same_and_pictures_without_truth_do_not() -> None:
    truth = [true(FIRST), true(SECOND, category=9)]
    results = [
        found(FIRST, 0.9),
        found(SECOND, 0.8),  # of the wrong class
        found(SECOND, 1.0, image=8),
        found(SECOND, 1.0, category=4),
    ]
    scores = average_precision(truth, results, "segm")
    assert scores["ap50"] == pytest.approx(0.5)


def test_nothing_is_known_or_nothing_is_found() -> None:
    assert average_precision([], [found(FIRST, 1.0)], "segm") == {}
    assert average_precision([true(FIRST, crowd=1)], [found(FIRST, 1.0)], "segm") == {}
    assert average_precision([true(FIRST)], [], "segm") == {"ap": 0, "ap50": 0, "ap75": 0}


def test_without_pycocotools_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r"^pycocotools: not installed, .*lpcam\[coco\]'$"):
        coco_tools()
