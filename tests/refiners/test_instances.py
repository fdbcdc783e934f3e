from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from lpcam.refiners.irn import IRN
from lpcam.refiners.irn.instances import cut_out, divide_maps, follow, group_cells
from lpcam.seeds.record import SeedRecord
from lpcam.stages.instances import _mean_displacement
from lpcam.storage.store import Stage
from tests.oracles import displacement as oracle
from tests.refiners.learning import fit, make_task, tiny_backbone

GRID = (24, 40)
CENTRES = ((11, 10), (12, 27))
RADIUS = 8
SMALL = {"radius": 4, "crop": 48, "batch_size": 4, "conf_fg": 0.6, "conf_bg": 0.4, "epochs": 1}


def discs() -> list[np.ndarray]:
    rows, columns = np.indices(GRID)
    return [(rows - y) ** 2 + (columns - x) ** 2 <= RADIUS**2 for y, x in CENTRES]


def place(mask: np.ndarray) -> float:
    return np.argwhere(mask)[:, 1].mean()


def field() -> Tensor:
    """Displacements from each cell of two touching discs to its disc's centre."""
    found = np.zeros((2, *GRID), np.float32)
    for inside, centre in zip(discs(), CENTRES, strict=True):
        way = np.array(centre)[:, None, None] - np.indices(GRID)
        found[:, inside] = way[:, inside]
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> IRN:
    folder = tmp_path_factory.mktemp("irn")
    refiner = IRN(**SMALL)
    fit(refiner, folder, make_task(folder / "shapes"))
    refiner.load(folder, tiny_backbone(), "cpu")
    return refiner


@pytest.mark.parametrize("size", [(9, 13), (1, 7), (6, 1), (1, 1)])
def test_following_equals_a_slow_loop(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ways = rng.uniform(-3, 3, (2, *size))
    found = follow(torch.from_numpy(ways), steps=5).numpy()
    np.testing.assert_allclose(found, oracle.follow(ways, 5), atol=1e-9)


def test_following_ends_where_nothing_moves() -> None:
    torch.testing.assert_close(follow(field()), follow(field(), steps=1), rtol=0, atol=1e-3)


def test_two_touching_discs_are_two_instances() -> None:
    touching = np.logical_or(*discs())
    groups = group_cells(field())
    owners, parts = divide_maps(torch.from_numpy(touching[None]).float(), groups, 0.5)
    assert owners == [0, 0]
    keys = np.array([3])[owners]
    found = cut_out(SeedRecord(keys, parts.numpy(), GRID), 0.5)
    assert [instance.label for instance in found] == [3, 3]
    masks = sorted((instance.mask for instance in found), key=place)
    np.testing.assert_array_equal(masks, discs())


def test_cells_that_get_to_no_centre_are_one_group() -> None:
    away = torch.full((2, 5, 9), 4.0)
    assert (group_cells(away) == 0).all()


def test_the_mean_displacement_is_subtracted(refiner: IRN, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = torch.tensor([5.0, -3.0])
    monkeypatch.setattr(refiner, "displacement", lambda image: field() + shift[:, None, None])
    monkeypatch.setattr(refiner, "edge", lambda image: torch.zeros(GRID))
    monkeypatch.setattr(refiner, "steps", 1)
    monkeypatch.setattr(refiner, "walk_radius", 2)
    image, size = Image.new("RGB", (160, 96)), (96, 160)
    seed = SeedRecord(np.array([2]), np.logical_or(*discs())[None].astype(np.float16), size)
    scores = refiner.instances(image, seed, shift, 0.3)
    assert scores.keys.tolist() == [2, 2]
    reached = [scored > 0 for scored in scores.maps]  # one cell further, by the only step
    grown = [ndimage.binary_dilation(inside, np.ones((3, 3))) for inside in discs()]
    np.testing.assert_array_equal(sorted(reached, key=place), grown)


def test_the_scores_of_instances_add_up_to_those_of_their_class(refiner: IRN) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    seed = SeedRecord(np.array([1, 4]), rng.random((2, 16, 24)).astype(np.float16), (64, 96))
    mean = refiner.displacement(image).mean((1, 2))
    parts = refiner.instances(image, seed, mean, 0.0)
    whole = refiner.refine("a", image, seed).maps.astype(float)
    total = np.stack([parts.maps[parts.keys == key].astype(float).sum(0) for key in (1, 4)])
    np.testing.assert_allclose(total / total.max(), whole, atol=5e-3)
    assert parts.maps.max() == 1


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_is_found_in_empty_maps(refiner: IRN, count: int) -> None:
    seed = SeedRecord(np.arange(count), np.zeros((count, 8, 13), np.float16), (30, 50))
    scores = refiner.instances(Image.new("RGB", (50, 30)), seed, torch.zeros(2), 0.2)
    assert scores.maps.shape == (0, 8, 13)
    assert cut_out(scores, 0.2) == []


@pytest.mark.parametrize("size", [(33, 500), (41, 1), (1, 1)])
def test_any_size(refiner: IRN, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    grid = tuple((side - 1) // 4 + 1 for side in size)
    seed = SeedRecord(np.arange(3), rng.uniform(0.5, 1, (3, *grid)).astype(np.float16), size)
    found = cut_out(refiner.instances(image, seed, torch.zeros(2), 0.2), 0.2)
    assert all(instance.mask.shape == size for instance in found)
    assert sum(instance.mask.astype(int) for instance in found).max() == 1


def test_parts_of_a_map_by_their_scores() -> None:
    maps = np.zeros((2, 20, 30))
    maps[0, 2:8, 2:8] = 0.6
    maps[0, 12:18, 2:8] = 0.8
    maps[0, 0, 29] = 1.0  # smaller than a hundredth of the picture
    maps[1, 6:12, 15:25] = 0.7
    maps[1, 2:8, 2:8] = 0.5  # which the other wins
    found = cut_out(SeedRecord(np.array([5, 1]), maps, (20, 30)), 0.4)
    assert [(i.label, round(i.score, 3)) for i in found] == [(5, 0.8), (1, 0.7), (5, 0.6)]
    np.testing.assert_array_equal(found[2].mask, maps[0] == 0.6)
    assert cut_out(SeedRecord(np.array([5, 1]), maps, (20, 30)), 1.0) == []


def test_the_mean_is_that_of_the_training_pictures(refiner: IRN, tmp_path: Path) -> None:
    task = make_task(tmp_path, 3)
    trained = Stage(tmp_path, "irn_network", {})
    found = _mean_displacement(tmp_path, refiner, trained, task.dataset)
    images = [Image.open(picture.path) for picture in task.pictures]
    means = torch.stack([refiner.displacement(image).mean((1, 2)) for image in images])
    torch.testing.assert_close(found, means.mean(0))
