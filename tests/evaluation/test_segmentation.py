import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.classification import MulticlassJaccardIndex

from lpcam.errors import InputError
from lpcam.evaluation import SegmentationResult, SegmentationScore
from lpcam.seeds.masks import seed_mask
from tests.oracles import segmentation as oracle

CLASSES = 3
BINS = 10
Picture = tuple[np.ndarray, list[int], np.ndarray]


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    """Maps, classes and mask; many scores lie exactly on a threshold, many are equal."""
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    classes = draw(st.lists(st.integers(0, CLASSES - 1), unique=True).map(sorted))
    score = st.integers(0, BINS).map(lambda i: np.float32(i / BINS)) | st.floats(0, 1, width=32)
    maps = draw(hnp.arrays(np.float32, (len(classes), *size), elements=score))
    mask = draw(hnp.arrays(np.uint8, size, elements=st.sampled_from([0, 1, 2, 3, 255])))
    return maps, classes, mask


def score_of(*split: Picture, bins: int = BINS) -> SegmentationScore:
    score = SegmentationScore(CLASSES, bins)
    for maps, classes, mask in split:
        score.update(torch.from_numpy(maps), classes, mask)
    return score


def random_picture(seed: int, size: tuple[int, int] = (12, 17)) -> Picture:
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), size)
    return rng.random((CLASSES, *size), dtype=np.float32), [0, 1, 2], mask


splits = st.lists(pictures(), min_size=1, max_size=3).filter(
    lambda split: any((mask != 255).any() for _, _, mask in split)
)


@settings(deadline=None)
@given(splits)
def test_every_threshold_equals_the_slow_loop(split: list[Picture]) -> None:
    result = score_of(*split).compute()

    assert result.thresholds.tolist() == [i / BINS for i in range(BINS + 1)]
    for i, threshold in enumerate(result.thresholds):
        counts = sum(
            oracle.confusion(mask, oracle.seed_mask(maps, classes, threshold), CLASSES)
            for maps, classes, mask in split
        )
        np.testing.assert_array_equal(result.confusion[i], counts)
        for name, expected in oracle.scores(counts).items():
            assert getattr(result, name)[i] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.37, 0.5])
def test_miou_equals_torchmetrics(threshold: float) -> None:
    maps, classes, mask = random_picture(0)
    result = score_of((maps, classes, mask), bins=100).compute()

    metric = MulticlassJaccardIndex(CLASSES + 1, average="macro", ignore_index=255)
    prediction = oracle.seed_mask(maps, classes, threshold)
    expected = metric(torch.from_numpy(prediction), torch.from_numpy(mask.astype(np.int64)))

    assert result.miou[result.index(threshold)] == pytest.approx(float(expected), abs=1e-6)


def test_what_is_scored_is_what_is_written() -> None:
    rng = np.random.default_rng(0)
    # Scores on the thresholds themselves, where rounding decides.
    maps = (rng.integers(0, 101, (CLASSES, 20, 20)) / 100).astype(np.float32)
    mask = rng.integers(0, CLASSES + 1, (20, 20), dtype=np.uint8)
    result = score_of((maps, [0, 1, 2], mask), bins=100).compute()
    for i in range(101):
        prediction = seed_mask(torch.from_numpy(maps), np.arange(CLASSES), i / 100)
        expected = oracle.confusion(mask, prediction, CLASSES)
        np.testing.assert_array_equal(result.confusion[i], expected)


def test_by_hand() -> None:
    truth = np.array([[0, 0, 1, 1, 2, 255]], np.uint8)
    maps = np.array(
        [[[0.1, 0.6, 0.9, 0.3, 0.2, 1.0]], [[0.0, 0.0, 0.0, 0.7, 0.4, 0.0]]], np.float32
    )

    result = score_of((maps, [0, 1], truth)).compute()

    # Above 0.3 it reads [0, 1, 1, 2, 2, -].
    i = result.index(0.31)
    assert result.thresholds[i] == 0.3
    expected = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(result.confusion[i], expected)
    np.testing.assert_allclose(result.iou[i], [1 / 2, 1 / 3, 1 / 2, math.nan])
    assert result.miou[i] == pytest.approx(4 / 9)
    assert result.precision[i] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert result.recall[i] == pytest.approx((1 / 2 + 1) / 2)
    assert result.fp[i] == pytest.approx((1 - 2 / 3 + 1 - 1 / 2) / 2)
    assert result.fn[i] == pytest.approx((1 - 2 / 3 + 1 - 2 / 2) / 2)


@settings(deadline=None)
@given(splits, st.randoms(use_true_random=False))
def test_order_and_parts_change_nothing(split: list[Picture], random: object) -> None:
    whole = score_of(*split)
    shuffled = list(split)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = SegmentationScore(CLASSES, BINS)
    for picture in shuffled:
        parts.histogram += score_of(picture).histogram
    np.testing.assert_array_equal(parts.histogram, whole.histogram)


@settings(deadline=None)
@given(splits)
def test_invariants(split: list[Picture]) -> None:
    result = score_of(*split).compute()
    known = sum(int((mask != 255).sum()) for _, _, mask in split)

    assert result.confusion.dtype == np.int64
    assert (result.confusion.sum((1, 2)) == known).all()
    foreground = result.confusion[:, :, 1:].sum((1, 2))
    assert all(later <= earlier for earlier, later in pairwise(foreground))
    assert foreground[-1] == 0  # no score exceeds 1

    for iou, fp, fn in zip(result.iou[:, 1:], result.fp, result.fn, strict=True):
        defined = iou[~np.isnan(iou)]
        if len(defined):
            assert defined.mean() + fp + fn == pytest.approx(1)
        else:
            assert math.isnan(fp)
            assert math.isnan(fn)
    assert result.miou[result.best] == result.miou.max()
    assert (result.miou[: result.best] < result.miou.max()).all()


def test_ignored_pixels_do_not_count() -> None:
    maps, classes, mask = random_picture(1)
    other = np.where(mask == 255, 1 - maps, maps)
    first, second = score_of((maps, classes, mask)), score_of((other, classes, mask))
    np.testing.assert_array_equal(first.histogram, second.histogram)
    assert not np.array_equal(maps, other)


def test_a_perfect_map() -> None:
    _, classes, mask = random_picture(2)
    maps = np.stack([(mask == label) * np.float32(0.5) for label in (1, 2, 3)])
    result = score_of((maps, classes, mask), bins=100).compute()
    # Every threshold below 0.5 is perfect; at and above it all is background.
    assert (result.best, result.miou[49]) == (0, 1)
    assert result.miou[50] < 0.1
    assert result.threshold_width == 0.5
    assert (result.precision[0], result.recall[0], result.fp[0], result.fn[0]) == (1, 1, 0, 0)


def test_threshold_width_counts_within_one_point() -> None:
    # One class fills the picture: its IoU and the mean of both change by 0.5 % a pixel.
    maps = np.ones((1, 1, 100), np.float32)
    maps[0, 0, :4] = [0.15, 0.25, 0.35, 0.45]
    truth = np.ones((1, 100), np.uint8)
    result = score_of((maps, [0], truth)).compute()
    # IoU 1 up to threshold 0.1; then background is predicted, its IoU is 0 and halves the mean.
    np.testing.assert_allclose(result.miou[:6], [1, 1, 0.495, 0.49, 0.485, 0.48])
    assert result.threshold_width == pytest.approx(0.2)

    truth[0, :50] = 0
    maps[0, 0, :50] = 0.05
    maps[0, 0, 50:55] = [0.15, 0.25, 0.35, 0.45, 0.55]
    result = score_of((maps, [0], truth)).compute()
    # t = 0.1 is perfect, each further pixel costs (1/50 + 1/51) / 2 = 0.0198.
    assert result.best == 1
    assert result.threshold_width == pytest.approx(0.1)


def test_threshold_width_never_exceeds_the_unit_interval() -> None:
    result = score_of((np.zeros((0, 3, 3), np.float32), [], np.zeros((3, 3), np.uint8))).compute()
    assert result.threshold_width == 1


def test_pictures_without_labels() -> None:
    mask = np.array([[0, 1], [255, 0]], np.uint8)
    result = score_of((np.zeros((0, 2, 2), np.float32), [], mask)).compute()
    expected = np.zeros((CLASSES + 1, CLASSES + 1))
    expected[0, 0], expected[1, 0] = 2, 1
    assert (result.confusion == expected).all()


def test_metrics() -> None:
    result = score_of(random_picture(3), bins=100).compute()
    values = result.metrics(["aeroplane", "bicycle", "bird"], threshold=0.3)
    assert set(values) == {
        "miou", "best_threshold", "threshold", "miou_at_threshold", "precision", "recall",
        "fp", "fn", "threshold_width", "iou/background", "iou/aeroplane", "iou/bicycle", "iou/bird",
    }  # fmt: skip
    assert {type(value) for value in values.values()} == {float}
    best = result.best
    assert values["miou"] == result.miou.max()
    assert values["best_threshold"] == best / 100
    assert values["miou_at_threshold"] == result.miou[30]
    for name in ("precision", "recall", "fp", "fn"):
        assert values[name] == getattr(result, name)[best]
    assert values["iou/bird"] == result.iou[best, 3]
    assert values["iou/background"] == result.iou[best, 0]


def test_metrics_leave_out_what_is_undefined() -> None:
    maps = np.full((1, 2, 2), 0.5, np.float32)
    mask = np.array([[0, 0], [1, 1]], np.uint8)
    values = score_of((maps, [0], mask)).compute().metrics(["a", "b", "c"], 0.3)
    assert "iou/a" in values
    assert not {"iou/b", "iou/c"} & set(values)

    only_background = score_of((maps[:0], [], np.zeros((2, 2), np.uint8))).compute()
    values = only_background.metrics(["a", "b", "c"], 0.3)
    assert "precision" not in values
    assert values["miou"] == 1
    json.dumps(values, allow_nan=False)


def test_metrics_need_a_name_for_every_class() -> None:
    with pytest.raises(ValueError, match="argument"):
        score_of(random_picture(0)).compute().metrics(["a", "b"], 0.3)


def test_nearest_threshold() -> None:
    result = SegmentationResult(np.arange(101) / 100, np.zeros((101, 2, 2), np.int64))
    assert [result.index(t) for t in (0, 0.3, 0.304, 0.306, 1, 7.0)] == [0, 30, 30, 31, 100, 100]


@pytest.mark.parametrize(
    ("maps", "classes", "mask", "found"),
    [
        (np.zeros((1, 4, 5)), [0], np.zeros((5, 4)), r"\(1, 4, 5\).*\(5, 4\)"),
        (np.zeros((1, 4, 5)), [0, 1], np.zeros((4, 5)), "2 classes"),
        (np.zeros((1, 4, 5)), [3], np.zeros((4, 5)), "index 3.*3 classes"),
        (np.zeros((1, 4, 5)), [0], np.full((4, 5), 4), "label 4.*3 classes"),
        (np.full((1, 4, 5), math.nan), [0], np.zeros((4, 5)), "NaN"),
    ],
)
def test_wrong_input(maps: np.ndarray, classes: list[int], mask: np.ndarray, found: str) -> None:
    score = SegmentationScore(CLASSES)
    with pytest.raises(InputError, match=found) as caught:
        score.update(torch.from_numpy(maps), classes, mask.astype(np.uint8))
    assert "\n" not in str(caught.value)
    assert not score.histogram.any()


def test_nothing_to_score() -> None:
    score = score_of((np.zeros((1, 2, 2), np.float32), [0], np.full((2, 2), 255, np.uint8)))
    with pytest.raises(InputError, match="255"):
        score.compute()
