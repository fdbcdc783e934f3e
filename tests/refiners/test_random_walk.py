from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lpcam.refiners
from lpcam.errors import InputError
from lpcam.refiners import random_walk
from lpcam.refiners.random_walk import (
    at_offset,
    chebyshev_coefficients,
    edge_affinity,
    pair_offsets,
    path_cells,
    propagate,
)
from tests.oracles import random_walk as oracle

GOLDEN = Path(__file__).parents[1] / "data_files" / "official_random_walk.npz"


def picture(size: tuple[int, int], seed: int = 0, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((count, *size)), rng.random(size) ** 3


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("index", range(3))
def test_published_walks_are_reproduced(index: int) -> None:
    with np.load(GOLDEN, allow_pickle=False) as file:
        maps, edge, expected = (file[f"{name}_{index}"] for name in ("maps", "edge", "walk"))
    found = random_walk(torch.from_numpy(maps), torch.from_numpy(edge))
    assert found.dtype == torch.float32
    assert relative(found.numpy(), expected) < 2e-4


@pytest.mark.parametrize(
    ("size", "radius", "beta", "steps"),
    [
        ((9, 11), 5, 10, 256),
        ((12, 5), 5, 10, 256),
        ((7, 8), 3, 4, 33),
        ((6, 6), 8, 1, 5),
        ((2, 3), 5, 10, 256),
        ((1, 1), 5, 10, 256),
        ((1, 13), 5, 2, 7),
        ((13, 1), 5, 2, 7),
        ((4, 4), 2, 10, 9),
    ],
)
def test_equals_the_dense_matrix_power(
    size: tuple[int, int], radius: int, beta: float, steps: int
) -> None:
    maps, edge = picture(size)
    expected = oracle.random_walk(maps, edge, radius, beta, steps)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        tensors = [torch.from_numpy(array).to(dtype) for array in (maps, edge)]
        found = random_walk(*tensors, radius=radius, beta=beta, steps=steps)
        assert found.dtype == dtype
        assert relative(found.numpy(), expected) < tolerance


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    radius=st.integers(2, 6),
    steps=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_any_size_and_radius(height: int, width: int, radius: int, steps: int, seed: int) -> None:
    maps, edge = picture((height, width), seed)
    found = random_walk(
        torch.from_numpy(maps), torch.from_numpy(edge), radius=radius, beta=3, steps=steps
    )
    expected = oracle.random_walk(maps, edge, radius, 3, steps)
    assert relative(found.numpy(), expected) < 1e-10


@pytest.mark.parametrize(("radius", "count"), [(10, 152), (5, 34), (2, 4), (1, 0)])
def test_pair_offsets(radius: int, count: int) -> None:
    offsets = pair_offsets(radius)
    assert len(offsets) == count
    assert set(offsets) == oracle.near_offsets(radius)


def test_path_cells() -> None:
    for offset in pair_offsets(10):
        assert set(path_cells(offset)) == set(oracle.cells_between((0, 0), offset))
    assert path_cells((0, 3)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert path_cells((1, -1)) == [(0, -1), (0, 0), (1, -1), (1, 0)]


def test_affinity_of_the_sources_that_have_all_neighbours() -> None:
    radius, (height, width) = 3, (6, 9)
    _, edge = picture((height, width))
    found = edge_affinity(torch.from_numpy(edge)[None], radius)[0].numpy()
    assert found.shape == (len(pair_offsets(radius)), 4, 5)
    matrix = oracle.affinity_matrix(edge, radius)
    for o, (rows, columns) in enumerate(pair_offsets(radius)):
        for y in range(4):
            for x in range(5):
                start = y * width + x + radius - 1
                end = (y + rows) * width + x + radius - 1 + columns
                assert found[o, y, x] == pytest.approx(matrix[start, end], abs=1e-12)


def test_at_offset() -> None:
    grid = torch.arange(30).reshape(5, 6)
    torch.testing.assert_close(at_offset(grid, (0, 0), 3), grid[:3, 2:4])
    torch.testing.assert_close(at_offset(grid, (2, -2), 3), grid[2:, :2])


def test_propagate_with_learnt_affinities() -> None:
    radius, size = 3, (4, 5)
    rng = np.random.default_rng(1)
    maps, pairs = rng.random((2, *size)), rng.random((len(pair_offsets(radius)), *size))
    matrix = np.eye(20)
    for o, (rows, columns) in enumerate(pair_offsets(radius)):
        for y, x in np.ndindex(size):
            if y + rows < size[0] and 0 <= x + columns < size[1]:
                start, end = y * size[1] + x, (y + rows) * size[1] + x + columns
                matrix[start, end] = matrix[end, start] = pairs[o, y, x]
    found = propagate(
        torch.from_numpy(maps), torch.from_numpy(pairs), radius=radius, beta=2, steps=6
    )
    np.testing.assert_allclose(found.numpy(), oracle.walk(maps, matrix, 2, 6), rtol=1e-12)


def test_a_closed_boundary_holds_the_maps_back() -> None:
    edge = torch.zeros(12, 20)
    edge[:, 10] = 1
    maps = torch.zeros(1, 12, 20)
    maps[0, 6, 3] = 1
    found = random_walk(maps, edge)[0]
    assert found[:, 10:].eq(0).all()
    assert found[:, :10].gt(0).all()


def test_without_boundaries_a_constant_stays() -> None:
    maps = torch.full((1, 7, 9), 0.3)
    torch.testing.assert_close(random_walk(maps, torch.zeros(7, 9)), maps)


@pytest.mark.parametrize("power", [0, 1, 2, 3, 7, 64, 256, 1000])
def test_powers_as_sums_of_chebyshev_polynomials(power: int) -> None:
    coefficients = chebyshev_coefficients(power)
    points = np.linspace(-1, 1, 101)
    found = np.polynomial.chebyshev.chebval(points, coefficients)
    np.testing.assert_allclose(found, points**power, atol=1e-14)


def test_many_steps_take_half_as_many_products() -> None:
    assert len(chebyshev_coefficients(256)) <= 130


def test_no_class_and_nothing_found() -> None:
    edge = torch.rand(9, 125)
    assert random_walk(torch.zeros(0, 9, 125), edge).shape == (0, 9, 125)
    assert random_walk(torch.zeros(3, 9, 125), edge).eq(0).all()
    walls = torch.ones(4, 5)
    assert random_walk(torch.rand(2, 4, 5), walls).eq(0).all()


def test_classes_do_not_influence_each_other() -> None:
    maps, edge = (torch.from_numpy(array) for array in picture((8, 10), count=4))
    together = random_walk(maps, edge)
    for k in range(4):
        torch.testing.assert_close(random_walk(maps[k : k + 1], edge)[0], together[k])


def test_arguments_stay_as_they_are() -> None:
    maps, edge = (torch.from_numpy(array) for array in picture((5, 6)))
    kept = maps.clone(), edge.clone()
    random_walk(maps, edge, steps=3)
    assert maps.equal(kept[0])
    assert edge.equal(kept[1])


def test_half_precision_maps_walk_in_single_precision() -> None:
    maps, edge = (torch.from_numpy(array) for array in picture((5, 6)))
    found = random_walk(maps.half(), edge.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, random_walk(maps.half().float(), edge.half().float()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu() -> None:
    maps, edge = (torch.from_numpy(array) for array in picture((20, 30)))
    found = random_walk(maps.cuda(), edge.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), random_walk(maps, edge))


def test_different_grids_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 4, 5\).*\(5, 4\)"):
        random_walk(torch.rand(2, 4, 5), torch.rand(5, 4))


def test_a_radius_without_pairs_is_refused() -> None:
    with pytest.raises(InputError, match="radius=1"):
        random_walk(torch.rand(1, 4, 5), torch.rand(4, 5), radius=1)


def test_the_package_offers_the_function() -> None:
    assert callable(lpcam.refiners.random_walk)
