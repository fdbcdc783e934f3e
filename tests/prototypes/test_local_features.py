from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpcam import local_features
from lpcam.errors import InputError
from lpcam.prototypes.local_features import choose_pictures, split_features
from tests.oracles import prototypes as oracle


def random_labels(seed: int, pictures: int = 60) -> np.ndarray:
    labels = (np.random.default_rng(seed).random((pictures, 4)) < 0.4).astype(np.float32)
    labels[:, 3] = 0
    labels[5, 3] = labels[9, 3] = 1
    return labels


def test_all_pictures_of_a_class_by_default() -> None:
    labels = random_labels(0)
    for c, chosen in enumerate(choose_pictures(labels)):
        assert chosen == np.flatnonzero(labels[:, c]).tolist()


@given(st.integers(0, 10**6), st.integers(1, 70), st.booleans())
def test_chosen_pictures(seed: int, count: int, with_replacement: bool) -> None:
    labels = random_labels(1)
    chosen = choose_pictures(labels, count, with_replacement=with_replacement, seed=seed)
    for c, own in enumerate(chosen):
        shown = np.flatnonzero(labels[:, c])
        assert set(own) <= set(shown)
        assert own == sorted(own)
        assert len(own) == (count if with_replacement else min(count, len(shown)))
        if not with_replacement:
            assert max(Counter(own).values()) == 1
    assert chosen == choose_pictures(labels, count, with_replacement=with_replacement, seed=seed)
    others = labels.copy()
    others[:, 0] = 0
    again = choose_pictures(others, count, with_replacement=with_replacement, seed=seed)
    assert again == [[], *chosen[1:]]


def test_every_picture_is_drawn_equally_often() -> None:
    labels = np.ones((10, 1))
    for with_replacement in (False, True):
        draws = Counter(
            picture
            for seed in range(1000)
            for picture in choose_pictures(labels, 3, with_replacement=with_replacement, seed=seed)[
                0
            ]
        )
        assert len(draws) == 10
        assert all(230 < count < 370 for count in draws.values())  # 300 +- 5 sigma


def test_a_senseless_number_of_pictures_is_refused() -> None:
    with pytest.raises(InputError, match=r"^prototypes\.images_per_class=0: "):
        choose_pictures(random_labels(2), 0)


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.5])
def test_a_given_cam_splits_strictly(tau: float) -> None:
    rng = np.random.default_rng(3)
    grids = [rng.random((4, 5, 6), np.float32).astype(np.float16) for _ in range(5)]
    cams = [(rng.integers(0, 9, (4, 5)) / 8).astype(np.float32) for _ in grids]
    pictures = [4, 1, 1, 3]

    sides = split_features(
        grids.__getitem__, pictures, torch.ones(6), tau, read_cam=cams.__getitem__
    )

    expected = oracle.split(
        [grids[i].transpose(2, 0, 1) for i in pictures], [cams[i] for i in pictures], tau
    )
    for side, rows in zip(sides, expected, strict=True):
        np.testing.assert_array_equal(side.rows.numpy(), rows)
        for row, (index, y, x) in zip(side.rows, side.places.tolist(), strict=True):
            np.testing.assert_array_equal(row.numpy(), grids[index][y, x])
    equal = sum(int((cams[i] == tau).sum()) for i in pictures)
    assert (equal > 0) == (tau != 0.1)
    assert sum(len(side.rows) for side in sides) == 4 * 5 * len(pictures) - equal


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4000), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_rows_do_not_depend_on_the_blocks(block: int, heights: list[int]) -> None:
    rng = np.random.default_rng(sum(heights))
    grids = [rng.normal(size=(height, 7, 3)).astype(np.float16) for height in heights]
    pictures = range(len(grids))
    weight = torch.tensor([1.0, -0.5, 0.2])
    whole = split_features(grids.__getitem__, pictures, weight, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_features, "BLOCK", block)
        parts = split_features(grids.__getitem__, pictures, weight, 0.3)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.places, other.places)
        order = one.places[:, 0].tolist()
        assert order == sorted(order)
