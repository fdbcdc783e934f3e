from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpcam.refiners.par import PAR, neighbour_offsets, pixel_adaptive_refinement
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord, load_seed, save_seed
from tests.oracles.par import refine as slow_refine


def random_inputs(size: tuple[int, int], classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, *size, generator=generator)
    return images, torch.rand(1, classes, *size, generator=generator)


def test_neighbours() -> None:
    assert len(neighbour_offsets((1, 2, 4, 8, 12, 24))) == 48
    assert set(neighbour_offsets([3])) == {
        (-3, -3), (-3, 0), (-3, 3), (0, -3), (0, 3), (3, -3), (3, 0), (3, 3),
    }  # fmt: skip


@pytest.mark.parametrize(("dilations", "iterations"), [((1,), 1), ((1, 3), 3), ((2, 9), 2)])
def test_equals_a_loop_over_pixels(dilations: tuple[int, ...], iterations: int) -> None:
    images, maps = random_inputs((6, 7))
    images[..., :3] = 0.5  # a flat part, where no neighbour deviates

    found = pixel_adaptive_refinement(
        images, maps, dilations=dilations, iterations=iterations, contrast=0.4, position_weight=0.1
    )

    wanted = slow_refine(
        images[0].double().numpy(), maps[0].double().numpy(), dilations, iterations, 0.4, 0.1
    )
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 1000),
    value=st.floats(0, 1, width=32),
)
def test_a_constant_map_stays_and_no_score_leaves_the_range(
    size: tuple[int, int], seed: int, value: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, *size, generator=generator)
    maps = torch.rand(1, 2, *size, generator=generator)
    maps[:, 1] = value

    found = pixel_adaptive_refinement(images, maps, dilations=(1, 4), iterations=3)

    torch.testing.assert_close(found[:, 1], maps[:, 1], rtol=0, atol=1e-5)
    assert found[:, 0].min() >= maps[:, 0].min() - 1e-5
    assert found[:, 0].max() <= maps[:, 0].max() + 1e-5


def test_in_a_flat_picture_every_neighbour_counts_the_same() -> None:
    maps = torch.zeros(1, 1, 9, 9)
    maps[..., 4, 4] = 1

    found = pixel_adaptive_refinement(
        torch.full((1, 3, 9, 9), 0.3), maps, dilations=(1, 2), iterations=1, position_weight=0
    )

    wanted = torch.zeros(9, 9)
    for dy, dx in neighbour_offsets((1, 2)):
        wanted[4 + dy, 4 + dx] = 1 / 16
    torch.testing.assert_close(found[0, 0], wanted, rtol=0, atol=1e-7)


def test_scores_stop_at_an_edge() -> None:
    """Two flat halves, black and white: the map fills the half that it touches."""
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 2:14, 2:7] = 1

    found = pixel_adaptive_refinement(images, maps, dilations=(1, 2), iterations=40)[0, 0]

    assert found[:, :8].min() > 0.25
    assert found[:, 8:].max() < 0.05


def test_pictures_of_a_batch_do_not_mix() -> None:
    pairs = [random_inputs((10, 8), classes=3), random_inputs((10, 8), classes=3)]
    pairs[1] = (pairs[1][0].flip(2), pairs[1][1] ** 2)
    images, maps = (torch.cat(part) for part in zip(*pairs, strict=True))

    found = pixel_adaptive_refinement(images, maps)

    for index, (image, its_maps) in enumerate(pairs):
        alone = pixel_adaptive_refinement(image, its_maps)
        torch.testing.assert_close(found[index], alone[0], rtol=0, atol=1e-6)


def test_no_iteration_changes_nothing() -> None:
    images, maps = random_inputs((5, 6))
    assert pixel_adaptive_refinement(images, maps, iterations=0).equal(maps)


@pytest.mark.parametrize("classes", [0, 1, 5])
@pytest.mark.parametrize("size", [(20, 31), (33, 500)])
def test_records(tmp_path: Path, classes: int, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    grid = ((size[0] - 1) // 4 + 1, (size[1] - 1) // 4 + 1)
    seed = SeedRecord(np.arange(classes), random.random((classes, *grid)).astype(np.float16), size)
    if classes:
        seed.maps[0] = 0

    found = PAR(iterations=2).refine("a", image, seed)

    save_seed(tmp_path / "a.npz", found)
    loaded = load_seed(tmp_path / "a.npz")
    assert loaded.size == size
    assert loaded.full_size().shape == (classes, *size)
    assert loaded.keys.tolist() == list(range(classes))
    assert not classes or not loaded.maps[0].any()
    assert ((loaded.maps >= 0) & (loaded.maps <= 1)).all()
    mask = seed_mask(loaded.full_size(), loaded.keys, 0.3)
    assert mask.any() == (classes > 1)


def test_on_a_grid_of_every_pixel_it_is_the_function() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (10, 13, 3), dtype=np.uint8)
    maps = random.random((2, 10, 13)).astype(np.float16)
    seed = SeedRecord(np.array([1, 4]), maps, (10, 13))

    found = PAR(stride=1, iterations=2).refine("a", Image.fromarray(pixels), seed)

    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    wanted = pixel_adaptive_refinement(images, torch.from_numpy(maps).float()[None], iterations=2)
    np.testing.assert_allclose(found.maps, wanted[0].numpy(), rtol=0, atol=2**-12)


def test_every_setting_is_an_input() -> None:
    refiner = PAR(dilations=(1, 2), iterations=3, contrast=0.5, position_weight=0.1, source="cam")
    assert refiner.inputs([]) == {
        "refiner": "PAR",
        "stride": 2,
        "dilations": [1, 2],
        "iterations": 3,
        "contrast": 0.5,
        "position_weight": 0.1,
    }
