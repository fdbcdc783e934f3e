from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from lpcam.errors import InputError
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.local_features import Draw, draw_pictures, split_features
from lpcam.settings import make
from tests.oracles import prototypes as oracle
from tests.oracles.activation import normalize_map


def random_labels(seed: int, pictures: int = 60) -> np.ndarray:
    labels = (np.random.default_rng(seed).random((pictures, 4)) < 0.4).astype(np.float32)
    labels[:, 3] = 0
    labels[5, 3] = labels[9, 3] = 1
    return labels


def test_all_pictures_of_a_class_by_default() -> None:
    labels = random_labels(0)
    for c, chosen in enumerate(draw_pictures(labels, Draw())):
        assert chosen == np.flatnonzero(labels[:, c]).tolist()


@given(st.integers(0, 10**6), st.integers(1, 70), st.booleans())
def test_chosen_pictures(seed: int, count: int, with_replacement: bool) -> None:
    labels = random_labels(1)
    draw = Draw(images_per_class=count, with_replacement=with_replacement, seed=seed)
    chosen = draw_pictures(labels, draw)
    for c, pictures in enumerate(chosen):
        shown = np.flatnonzero(labels[:, c])
        assert set(pictures) <= set(shown)
        assert pictures == sorted(pictures)
        assert len(pictures) == (count if with_replacement else min(count, len(shown)))
        if not with_replacement:
            assert max(Counter(pictures).values()) == 1
    assert chosen == draw_pictures(labels, draw)
    others = labels.copy()
    others[:, 0] = 0
    assert draw_pictures(others, draw) == [[], *chosen[1:]]


def test_every_picture_is_drawn_equally_often() -> None:
    labels = np.ones((10, 1))
    for with_replacement in (False, True):
        draws: Counter[int] = Counter()
        for seed in range(1000):
            draw = Draw(images_per_class=3, with_replacement=with_replacement, seed=seed)
            draws.update(draw_pictures(labels, draw)[0])
        assert len(draws) == 10
        assert all(230 < count < 370 for count in draws.values())  # 300 +- 5 sigma


def test_a_senseless_number_of_pictures_is_refused() -> None:
    with pytest.raises(InputError, match=r"^prototypes\.images_per_class=0: "):
        make(Draw, {"images_per_class": 0}, "prototypes.{}".format)
    with pytest.raises(ValidationError):
        Draw(images_per_class=0)


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("strict", [True, False])
def test_a_given_map_splits(tau: float, strict: bool) -> None:
    rng = np.random.default_rng(3)
    grids = [rng.random((4, 5, 6), np.float32).astype(np.float16) for _ in range(5)]
    maps = [(rng.integers(0, 9, (4, 5)) / 8).astype(np.float32) for _ in grids]
    pictures = [4, 1, 1, 3]

    sides = split_features(
        grids.__getitem__,
        pictures,
        LinearHead(torch.ones(1, 6)),
        0,
        tau,
        read_map=maps.__getitem__,
        strict=strict,
    )

    # The maps are multiples of 1/8: where one equals tau, a little more is foreground.
    expected = oracle.split(
        [grids[i].transpose(2, 0, 1) for i in pictures],
        [maps[i] if strict else maps[i] + np.float32(1e-3) * (maps[i] == tau) for i in pictures],
        tau,
    )
    for side, rows in zip(sides, expected, strict=True):
        np.testing.assert_array_equal(side.rows.numpy(), rows)
        for row, (index, y, x) in zip(side.rows, side.places.tolist(), strict=True):
            np.testing.assert_array_equal(row.numpy(), grids[index][y, x])
    equal = sum(int((maps[i] == tau).sum()) for i in pictures)
    assert (equal > 0) == (tau != 0.1)
    everywhere = 4 * 5 * len(pictures)
    assert sum(len(side.rows) for side in sides) == (everywhere - equal if strict else everywhere)


class OneChannel:
    """A host whose map of a class is a channel of the features, without any weights."""

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        return (features if classes is None else features[:, classes]).relu()

    def score(self, vectors: Tensor) -> Tensor:
        return vectors


@pytest.mark.parametrize("class_index", range(3))
def test_any_heads_maps_split(class_index: int) -> None:
    rng = np.random.default_rng(4)
    grids = [rng.normal(size=(4, 5, 3)).astype(np.float16) for _ in range(4)]
    pictures = [0, 3, 2]

    sides = split_features(grids.__getitem__, pictures, OneChannel(), class_index, 0.4)

    locals_ = [grids[i].transpose(2, 0, 1) for i in pictures]
    maps = [
        normalize_map(np.maximum(local[class_index].astype(np.float64), 0), 1e-5)
        for local in locals_
    ]
    for side, rows in zip(sides, oracle.split(locals_, maps, 0.4), strict=True):
        np.testing.assert_array_equal(side.rows.numpy(), rows)
        assert len(rows)


@pytest.mark.parametrize(("strict", "taken"), [(True, []), (False, [0, 1])])
def test_a_heads_own_map_may_be_compared_strictly(strict: bool, taken: list[int]) -> None:
    local = np.array([[[2.0], [2], [1]]], np.float16)
    highest = float(np.float32(2) / (np.float32(2) + np.float32(1e-5)))
    head = LinearHead(torch.ones(1, 1))
    sides = split_features(lambda _: local, [0], head, 0, highest, strict=strict)
    assert [side.places[:, 2].tolist() for side in sides] == [taken, [2]]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4000), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_rows_do_not_depend_on_the_blocks(block: int, heights: list[int]) -> None:
    rng = np.random.default_rng(sum(heights))
    grids = [rng.normal(size=(height, 7, 3)).astype(np.float16) for height in heights]
    pictures = range(len(grids))
    head = LinearHead(torch.tensor([[1.0, -0.5, 0.2]]))
    whole = split_features(grids.__getitem__, pictures, head, 0, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpcam.prototypes.local_features.BLOCK", block)
        parts = split_features(grids.__getitem__, pictures, head, 0, 0.3)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.places, other.places)
        order = one.places[:, 0].tolist()
        assert order == sorted(order)
