from collections import deque

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lpcam.evaluation import localisation
from lpcam.evaluation.localisation import LocalisationCounts, contour_boxes, count_pair


def disc(row: float, column: float, radius: float, size: int = 56) -> np.ndarray:
    """A cone that falls from 1 in its middle to 0 at its radius."""
    rows, columns = np.mgrid[:size, :size]
    distance = np.hypot(rows - row, columns - column)
    return np.clip(1 - distance / radius, 0, 1).astype(np.float32)


def slow_boxes(region: np.ndarray) -> set[tuple[int, int, int, int]]:
    """Boxes of outer and inner borders by flooding, of borders that are sets of region pixels."""
    height, width = region.shape
    seen = np.zeros_like(region)
    found = set()
    for start in np.ndindex(*region.shape):
        if seen[start]:
            continue
        inside, part, todo = region[start], {start}, deque([start])
        seen[start] = True
        steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if inside or 0 in (a, b)]
        while todo:
            row, column = todo.popleft()
            for a, b in steps:
                near = row + a, column + b
                if not (0 <= near[0] < height and 0 <= near[1] < width):
                    continue
                if region[near] == inside and not seen[near]:
                    seen[near] = True
                    part.add(near)
                    todo.append(near)
        if inside:
            border = part
        elif any(r in (0, height - 1) or c in (0, width - 1) for r, c in part):
            continue
        else:
            border = {
                (r + a, c + b) for r, c in part for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))
            }
            border -= part
        rows, columns = zip(*border, strict=True)
        right, below = min(max(columns) + 1, width - 1), min(max(rows) + 1, height - 1)
        found.add((min(columns), min(rows), right, below))
    return found


def slow_accuracy(scores: np.ndarray, true: list[tuple[int, int, int, int]], overlap: float) -> int:
    """Whether any of 100 thresholds gives a box that overlaps a true one enough."""
    grey = (255 * (scores - scores.min()) / (scores.max() - scores.min())).astype(np.uint8)
    for step in range(100):
        for a in slow_boxes(grey > int(step / 100 * 255)):
            for b in true:
                wide = min(a[2], b[2]) - max(a[0], b[0]) + 1
                high = min(a[3], b[3]) - max(a[1], b[1]) + 1
                both = max(wide, 0) * max(high, 0)
                areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
                if both / (sum(areas) - both) >= overlap:
                    return 1
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_boxes_are_those_of_borders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    region = rng.random((rng.integers(1, 14), rng.integers(1, 14))) < rng.choice([0.3, 0.5, 0.8])
    assert {tuple(box) for box in contour_boxes(region).tolist()} == slow_boxes(region)


def test_boxes_by_hand() -> None:
    region = np.zeros((8, 9), bool)
    region[1:6, 2:7] = True
    region[3, 4] = False
    assert sorted(contour_boxes(region).tolist()) == [[2, 1, 7, 6], [3, 2, 6, 5]]
    assert contour_boxes(np.zeros((3, 3), bool)).shape == (0, 4)
    assert contour_boxes(np.ones((3, 4), bool)).tolist() == [[0, 0, 3, 2]]


def test_a_map_that_is_the_box_is_right_and_one_beside_it_is_wrong() -> None:
    scores = np.zeros((224, 224), np.float32)
    scores[20:100, 30:150] = 1
    box = (30 / 224, 20 / 224, 150 / 224, 100 / 224)
    right = count_pair(scores, 0, 1, None, [box]).metrics()
    assert right == {"max_box_acc_v2": 1.0}
    beside = count_pair(scores, 0, 1, None, [(0.0, 0.6, 0.3, 1.0)]).metrics()
    assert beside == {"max_box_acc_v2": 0.0}
    half = (30 / 224, 20 / 224, 150 / 224, 180 / 224)  # overlaps by a half and a little
    assert count_pair(scores, 0, 1, None, [half]).metrics() == {
        "max_box_acc_v2": pytest.approx(2 / 3)
    }


@pytest.mark.parametrize("seed", range(6))
def test_box_accuracy_is_that_of_the_slow_way(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localisation, "SIDE", 32)  # that of the map: nothing is resized
    rng = np.random.default_rng(seed)
    scores = np.maximum(disc(10, 12, 9, 32), 0.8 * disc(*rng.integers(8, 24, 2), 6, 32))
    true = [(5, 4, 18, 15), (14, 13, 28, 27)]
    shares = [tuple((np.array(box) + 0.5) / 32) for box in true]
    found = count_pair(scores, 0, 1, None, shares)
    assert found.hits.max(0).tolist() == [slow_accuracy(scores, true, o) for o in (0.3, 0.5, 0.7)]


def test_accuracy_is_of_one_threshold_for_all_pairs() -> None:
    weak, strong = np.zeros((224, 224), np.float32), np.zeros((224, 224), np.float32)
    weak[:, :], strong[:, :] = 0.5, 0.1
    weak[0:100, 0:100], weak[150, 150] = 0.9, 1.0
    strong[0:100, 0:100], strong[150, 150] = 0.3, 1.0
    box = (0.0, 0.0, 100 / 224, 100 / 224)
    counts = count_pair(weak, 0, 1, None, [box]) + count_pair(strong, 0, 1, None, [box])
    assert counts.boxed == 2
    assert count_pair(weak, 0, 1, None, [box]).metrics()["max_box_acc_v2"] == 1
    assert count_pair(strong, 0, 1, None, [box]).metrics()["max_box_acc_v2"] == 1
    # After stretching, the square stands out above 0 in both: one threshold serves them.
    assert counts.metrics()["max_box_acc_v2"] == 1
    strong[0:100, 0:100] = 0.1  # it is lost in one, whatever the threshold
    counts = count_pair(weak, 0, 1, None, [box]) + count_pair(strong, 0, 1, None, [box])
    assert counts.metrics()["max_box_acc_v2"] == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_pixel_precision_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.choice([0, 1, 2, 255], (224, 224), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
    scores = rng.random((224, 224)).astype(np.float32) + 0.3 * (mask == 1)
    found = count_pair(scores, 0, 3, mask, [])
    stretched = (scores - scores.min()) / (scores.max() - scores.min())
    known = mask != 255
    wanted = average_precision_score((mask == 1)[known], (stretched[known] * 1000).astype(int))
    assert found.metrics() == {"pxap": pytest.approx(wanted, abs=1e-9)}


def test_pixel_precision_is_the_mean_over_classes() -> None:
    mask = np.zeros((224, 224), np.uint8)
    mask[:112] = 1
    mask[112:, :112] = 2
    perfect, none = (mask == 1).astype(np.float32), np.full((4, 4), 0.5, np.float32)
    counts = count_pair(perfect, 0, 3, mask, []) + count_pair(none, 1, 3, mask, [])
    # A constant map has the precision of chance.
    assert counts.metrics() == {"pxap": pytest.approx((1 + 0.25) / 2)}
    assert LocalisationCounts.zero(3).metrics() == {}
