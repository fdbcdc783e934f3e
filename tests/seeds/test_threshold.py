"""A background score that is chosen from maps and pictures alone."""

import numpy as np
import pytest
from PIL import Image

from lpcam.seeds.record import SeedRecord
from lpcam.seeds.threshold import LEAST, chosen_score, explained_colour, parting


def scene(rng, size=(60, 80)):
    """Two regions of different colour with noise."""
    truth = np.zeros(size, bool)
    truth[10:40, 20:60] = True
    colours = np.where(truth[..., None], [200, 40, 90], [30, 120, 160])
    pixels = np.clip(colours + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    return truth, Image.fromarray(pixels)


def record(strongest):
    size = strongest.shape[0] * 4, strongest.shape[1] * 4
    return SeedRecord(np.array([3]), strongest[None].astype(np.float16), size)


def by_definition(image, strongest, score):
    """Variance between the two sides as a share of the whole, pixel by pixel."""
    colours = np.asarray(image, float).reshape(-1, 3)
    inside = (strongest > score).ravel()
    if min(inside.sum(), (~inside).sum()) < LEAST * inside.size:
        return 0.0
    mean = colours.mean(0)
    between = sum(
        side.sum() * ((colours[side].mean(0) - mean) ** 2).sum() for side in (inside, ~inside)
    )
    return between / ((colours - mean) ** 2).sum()


def test_every_score_against_the_definition():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    strongest = rng.random((13, 17)).astype(np.float16).astype(np.float64)
    seed = SeedRecord(np.array([0]), strongest[None].astype(np.float16), (13, 17))
    found = explained_colour(image, seed)
    wanted = [by_definition(image, strongest, score) for score in np.arange(101) / 100]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("border", [0.2, 0.55, 0.8])
def test_the_score_is_found_at_which_the_map_ends_where_the_object_does(border):
    rng = np.random.default_rng(1)
    truth, image = scene(rng)
    strongest = np.where(
        truth, rng.uniform(border, 1, truth.shape), rng.uniform(0, border, truth.shape)
    )
    found = chosen_score(parting(image, record(strongest[::4, ::4])))
    exact = explained_colour(
        image, SeedRecord(np.array([0]), strongest[None].astype(np.float16), truth.shape)
    )
    assert chosen_score(exact) == pytest.approx(border, abs=0.02)
    assert found == pytest.approx(border, abs=0.15)  # of a sixteenth of the map


def test_nothing_is_said_of_a_picture_without_maps_or_colours():
    grey = Image.new("RGB", (8, 8), (9, 9, 9))
    assert explained_colour(grey, record(np.ones((2, 2)))) is None
    empty = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 2, 2), np.float16), (8, 8))
    assert explained_colour(grey, empty) is None


def test_a_map_that_parts_nothing_explains_nothing():
    _, image = scene(np.random.default_rng(2))
    assert not explained_colour(image, record(np.zeros((15, 20)))).any()
    assert parting(image, record(np.zeros((15, 20)))) is None


def test_pictures_count_alike():
    rng = np.random.default_rng(3)
    truth, image = scene(rng)
    faint = Image.fromarray((100 + np.asarray(image, int) // 20).astype(np.uint8))
    seed = record(np.where(truth, 0.7, 0.2)[::4, ::4])
    assert explained_colour(faint, seed).max() < explained_colour(image, seed).max()
    assert parting(faint, seed).max() == parting(image, seed).max() == 1
