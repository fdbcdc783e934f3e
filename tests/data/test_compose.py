import numpy as np
import pytest

from lpcam.data.compose import Sprite, compose
from lpcam.errors import InputError


def square(side, label=0, alpha=1.0, colour=200.0, parts=None):
    return Sprite(
        label, np.full((side, side, 3), colour), np.full((side, side), alpha, np.float32), parts
    )


def test_an_object_that_fills_the_picture_leaves_nothing_of_the_background():
    sample = compose(np.zeros((8, 8, 3), np.uint8), [square(8, 4)], 1.0, np.random.default_rng(0))
    assert (sample.image == 200).all()
    assert (sample.mask == 5).all()
    assert sample.objects == [(4, (0, 0, 8, 8))]
    assert sample.parts is None


@pytest.mark.parametrize(("alpha", "belongs"), [(0.5, False), (0.51, True), (0.25, False)])
def test_colours_are_blended_and_the_mask_starts_above_one_half(alpha, belongs):
    background = np.full((8, 8, 3), 100, np.uint8)
    sprite = square(8, alpha=alpha)
    sprite.alpha[0, 0] = 1
    sample = compose(background, [sprite], 0.01, np.random.default_rng(0))
    assert (sample.image[1:] == round(100 + alpha * 100)).all()
    assert (sample.mask[1:] == belongs).all()
    assert sample.mask[0, 0] == 1


def test_the_later_object_is_in_front_and_boxes_hold_what_is_seen():
    # As wide as the picture and 6 of its 8 rows high: the second covers most of the first.
    sprites = [
        Sprite(label, np.full((6, 8, 3), 50.0 + label), np.ones((6, 8), np.float32))
        for label in (0, 1)
    ]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sample = compose(np.zeros((8, 8, 3), np.uint8), sprites, 0.01, rng)
        rows = np.flatnonzero((sample.mask == 2).all(1))
        assert len(rows) == 6
        assert (sample.image[sample.mask == 2] == 51).all()
        assert sample.objects[1] == (1, (0, rows[0], 8, rows[-1] + 1))
        seen = np.flatnonzero((sample.mask == 1).any(1))
        assert len(seen) in (1, 2)
        assert sample.objects[0] == (0, (0, seen[0], 8, seen[-1] + 1))


def test_every_object_stays_visible_enough():
    for seed in range(50):
        sample = compose(
            np.zeros((40, 40, 3), np.uint8),
            [square(25, 0), square(25, 1)],
            0.7,
            np.random.default_rng(seed),
        )
        assert (sample.mask == 2).sum() == 625
        assert (sample.mask == 1).sum() >= 0.7 * 625


def test_what_cannot_be_placed_is_said_in_one_line():
    with pytest.raises(InputError, match=r"dataset\.min_visible: 0\.9 .*lower it") as caught:
        compose(
            np.zeros((8, 8, 3), np.uint8), [square(8), square(8)], 0.9, np.random.default_rng(0)
        )
    assert "\n" not in str(caught.value)


def test_parts_follow_the_object_in_front():
    sprites = [square(5, label, parts=np.full((5, 5), label + 1, np.uint8)) for label in (0, 1)]
    sample = compose(np.zeros((8, 8, 3), np.uint8), sprites, 0.1, np.random.default_rng(3))
    assert np.array_equal(sample.parts, sample.mask)
