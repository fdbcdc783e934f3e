"""A background score that is chosen from maps and pictures alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.seeds.record import SeedRecord, save_seed
from lpcam.seeds.threshold import (
    LEAST,
    chosen_score,
    colours,
    explained_colour,
    foreground_shares,
    parting,
)
from lpcam.stages.backgrounds import matched_background
from lpcam.storage.store import Stage


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
    found = explained_colour(colours(image, (13, 17)), seed)
    wanted = [by_definition(image, strongest, score) for score in np.arange(101) / 100]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("border", [0.2, 0.55, 0.8])
def test_the_score_is_found_at_which_the_map_ends_where_the_object_does(border):
    rng = np.random.default_rng(1)
    truth, image = scene(rng)
    strongest = np.where(
        truth, rng.uniform(border, 1, truth.shape), rng.uniform(0, border, truth.shape)
    )
    found = chosen_score(parting(colours(image, (15, 20)), record(strongest[::4, ::4])))
    exact = explained_colour(
        colours(image, truth.shape),
        SeedRecord(np.array([0]), strongest[None].astype(np.float16), truth.shape),
    )
    assert chosen_score(exact) == pytest.approx(border, abs=0.04)  # the curve falls unevenly
    assert found == pytest.approx(border, abs=0.15)  # of a sixteenth of the map


@pytest.mark.parametrize(
    ("good", "chosen"), [((0, 32), 0.16), ((20, 20), 0.2), ((0, 100), 0.5), ((61, 80), 0.7)]
)
def test_the_middle_of_the_nearly_best_is_chosen(good, chosen):
    curve = np.full(101, 0.89)
    curve[good[0] : good[1] + 1] = 0.91
    curve[good[0]] = 1.0
    assert chosen_score(7 * curve) == chosen


def test_nothing_is_said_of_a_picture_without_maps_or_colours():
    grey = colours(Image.new("RGB", (8, 8), (9, 9, 9)), (2, 2))
    assert explained_colour(grey, record(np.ones((2, 2)))) is None
    empty = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 2, 2), np.float16), (8, 8))
    assert explained_colour(grey, empty) is None


def test_a_map_that_parts_nothing_explains_nothing():
    _, image = scene(np.random.default_rng(2))
    cells = colours(image, (15, 20))
    assert not explained_colour(cells, record(np.zeros((15, 20)))).any()
    assert parting(cells, record(np.zeros((15, 20)))) is None


def test_pictures_count_alike():
    rng = np.random.default_rng(3)
    truth, image = scene(rng)
    faint = Image.fromarray((100 + np.asarray(image, int) // 20).astype(np.uint8))
    seed = record(np.where(truth, 0.7, 0.2)[::4, ::4])
    faint_cells, cells = (colours(picture, (15, 20)) for picture in (faint, image))
    assert explained_colour(faint_cells, seed).max() < explained_colour(cells, seed).max()
    assert parting(faint_cells, seed).max() == parting(cells, seed).max() == 1


def test_shares_are_counted_by_hand():
    seed = SeedRecord(np.array([0, 1]), np.array([[[0, 0.3]], [[0.5, 0.1]]], np.float16), (4, 8))
    shares = foreground_shares(seed)
    assert shares[0] == shares[29] == 1
    assert shares[31] == shares[49] == 0.5
    assert shares[50] == 0
    empty = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 2, 2), np.float16), (8, 8))
    assert not foreground_shares(empty).any()


def test_refined_maps_keep_the_share_of_objects(tmp_path):
    rng = np.random.default_rng(4)
    stages = []
    pictures = [Picture(f"p{i}", Path(f"p{i}.jpg"), (3,)) for i in range(7)]
    maps = [rng.random((10, 12)) for _ in pictures]
    for name, power in (("maps", 1), ("refined", 2)):
        stage = Stage(tmp_path, name, {})
        with stage.build() as folder:
            for picture, values in zip(pictures, maps, strict=True):
                save_seed(folder / f"{picture.id}.npz", record(values**power))
        stages.append(stage)
    # A map squared exceeds the square of a score where the map exceeds the score.
    for score in (0.3, 0.6):
        assert matched_background(*stages, pictures, score) == pytest.approx(score**2, abs=0.011)
