import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.models.backbones import build_backbone
from lpcam.refiners.heads import stage_channels
from lpcam.refiners.psa import POWERS, PSA, AffinityNetwork, feature_affinity
from lpcam.refiners.random_walk import pair_offsets
from lpcam.seeds.record import SeedRecord, grid_size, load_seed, save_seed
from tests.oracles import random_walk as oracle
from tests.refiners.learning import Losses, Task, fit, make_task, tiny_backbone

SMALL = {"radius": 3, "crop": 64, "batch_size": 4, "low": 0.5, "high": 1.5}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder, losses = tmp_path_factory.mktemp("psa"), Losses()
    fit(PSA(**SMALL, epochs=12), folder, task, losses)
    return folder, losses.losses


def ready(folder: Path, **settings: float) -> PSA:
    refiner = PSA(**SMALL, **settings)
    refiner.load(folder, tiny_backbone(), "cpu")
    return refiner


def test_training_improves_the_loss(trained: tuple[Path, list[float]]) -> None:
    folder, losses = trained
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    assert sorted(p.name for p in folder.iterdir()) == ["heads.safetensors", "labels"]


def test_a_killed_training_goes_on(task: Task, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(PSA(**SMALL, epochs=3), tmp_path, task, Losses(stop_before=5))
    assert (tmp_path / "checkpoint" / "last.ckpt").is_file()
    losses = Losses()
    fit(PSA(**SMALL, epochs=3), tmp_path, task, losses)
    assert len(losses.losses) == 2
    assert (tmp_path / "heads.safetensors").is_file()


def test_affinity_of_features() -> None:
    radius = 3
    features = torch.randn(1, 5, 6, 9, dtype=torch.float64)
    found = feature_affinity(features, radius)
    assert found.shape == (1, len(pair_offsets(radius)), 4, 5)
    for o, (rows, columns) in enumerate(pair_offsets(radius)):
        for y in range(4):
            for x in range(5):
                first = features[0, :, y, x + 2]
                second = features[0, :, y + rows, x + 2 + columns]
                expected = np.exp(-np.mean([abs(float(first[d] - second[d])) for d in range(5)]))
                assert float(found[0, o, y, x]) == pytest.approx(expected, rel=1e-12)


def test_scores_are_shares_of_a_walk_with_the_background(trained: tuple[Path, list[float]]) -> None:
    settings = {"power": 1.5, "beta": 3, "steps": 10}
    refiner = ready(trained[0], **settings)
    rng = np.random.default_rng(0)
    size, cells = (32, 40), (4, 5)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    seed = SeedRecord(np.array([1, 9]), rng.random((2, *size)).astype(np.float16), size)
    found = refiner.refine("a", image, seed)

    affinity = refiner.affinity(image).double().numpy()
    matrix = np.eye(20)
    for o, (rows, columns) in enumerate(pair_offsets(3)):
        for y, x in np.ndindex(cells):
            if y + rows < cells[0] and 0 <= x + columns < cells[1]:
                start, end = y * cells[1] + x, (y + rows) * cells[1] + x + columns
                matrix[start, end] = matrix[end, start] = affinity[o, y, x]
    maps = seed.maps.astype(np.float64)
    stack = np.concatenate([(1 - maps.max(0, keepdims=True)) ** 1.5, maps])
    pooled = stack.reshape(3, 4, 8, 5, 8).mean((2, 4))
    walked = torch.from_numpy(oracle.walk(pooled, matrix, 3, 10))
    grid = torch.nn.functional.interpolate(walked[None], (8, 10), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(found.maps, grid[1:] / (grid[:1] + grid[1:]), atol=1e-3)
    strongest = found.maps.max(0) > 0.5
    np.testing.assert_array_equal(strongest, grid[1:].max(0) > grid[0])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [(33, 500), (41, 1), (70, 83)])
def test_any_size(
    trained: tuple[Path, list[float]], tmp_path: Path, size: tuple[int, int], count: int
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    maps = rng.random((count, *grid_size(size))).astype(np.float16)
    found = ready(trained[0]).refine("a", image, SeedRecord(np.arange(count), maps, size))
    assert found.maps.shape == maps.shape
    assert np.isfinite(found.maps).all()
    assert 0 <= found.maps.min() <= found.maps.max() <= 1
    save_seed(tmp_path / "a.npz", found)
    assert load_seed(tmp_path / "a.npz").full_size().shape == (count, *size)


def test_no_class_zero_maps_and_full_maps(trained: tuple[Path, list[float]]) -> None:
    refiner = ready(trained[0])
    image = Image.new("RGB", (50, 30))
    empty = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 8, 13), np.float16), (30, 50))
    assert refiner.refine("a", image, empty).maps.shape == (0, 8, 13)
    for value in (0, 1):
        seed = SeedRecord(np.arange(80), np.full((80, 8, 13), value, np.float16), (30, 50))
        np.testing.assert_allclose(refiner.refine("a", image, seed).maps, value, atol=1e-3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_network_on_any_backbone(name: str) -> None:
    backbone = build_backbone(name, None).eval()
    network = AffinityNetwork(stage_channels(backbone))
    with torch.no_grad():
        found = network(backbone.stages(torch.rand(2, 3, 33, 131)), (5, 17))
    assert found.shape == (2, 448, 5, 17)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    backbone = tiny_backbone().eval()
    network = AffinityNetwork(stage_channels(backbone))
    images = torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        together = network(backbone.stages(images), (6, 8))[1:2]
        alone = network(backbone.stages(images[1:2]), (6, 8))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"low": 2, "high": 1}, r"^refiner\.low=2\.0: give at most refiner\.high=1"),
     ({"low": 0}, "should be greater than 0"), ({"crop": 60}, r"^refiner\.crop=60: "),
     ({"powers": "best"}, "choose from psa")],
)  # fmt: skip
def test_settings_outside_their_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSA(**settings)


@pytest.mark.parametrize("name", POWERS)
def test_powers_by_name(name: str) -> None:
    refiner = PSA(powers=name)
    assert (refiner.low, refiner.high, refiner.power) == POWERS[name]


@pytest.mark.parametrize("score", [0.27, 0.6])
def test_powers_follow_the_background_score_of_the_maps(score: float) -> None:
    refiner = PSA(seed_background=score)
    for power, x in zip(
        (refiner.low, refiner.high, refiner.power), (score + 0.12, score - 0.1, score), strict=True
    ):
        assert (1 - x) ** power == pytest.approx(x)
    assert refiner.background == 0.5


def test_single_values_take_precedence() -> None:
    refiner = PSA(powers="psa", low=1)
    assert (refiner.low, refiner.high, refiner.power) == (1, 32, 16)


def test_what_results_depend_on() -> None:
    plain = PSA()
    inputs = dict(plain.inputs([]))
    assert json.loads(json.dumps(inputs)) == inputs
    assert PSA(background=0.1, source="cam").inputs([]) == inputs
    assert PSA(beta=3).inputs([]) != inputs
    assert PSA(beta=3, steps=2, power=2).training_inputs() == plain.training_inputs()
    for changed in ({"low": 0.1}, {"high": 3}, {"radius": 4}, {"epochs": 1}, {"lr": 2}):
        assert PSA(**changed).training_inputs() != plain.training_inputs()
