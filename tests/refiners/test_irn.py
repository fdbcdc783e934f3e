import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.errors import InputError
from lpcam.models.backbones import build_backbone
from lpcam.refiners.heads import stage_channels
from lpcam.refiners.irn import IRN, POWER, THRESHOLDS
from lpcam.refiners.irn.network import RelationNetwork
from lpcam.refiners.random_walk import random_walk
from lpcam.seeds.record import SeedRecord, grid_size, load_seed, save_seed
from tests.refiners.learning import Losses, Task, fit, make_task, tiny_backbone

SMALL = {"radius": 4, "crop": 48, "batch_size": 4, "conf_fg": 0.6, "conf_bg": 0.4}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder, losses = tmp_path_factory.mktemp("irn"), Losses()
    fit(IRN(**SMALL, epochs=12), folder, task, losses)
    return folder, losses.losses


def ready(folder: Path, **settings: float) -> IRN:
    refiner = IRN(**SMALL, epochs=12, **settings)
    refiner.load(folder, tiny_backbone(), "cpu")
    return refiner


def test_training_improves_the_loss(trained: tuple[Path, list[float]]) -> None:
    folder, losses = trained
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    assert sorted(p.name for p in folder.iterdir()) == ["heads.safetensors", "labels"]
    assert len(list((folder / "labels").iterdir())) == 8


def test_a_killed_training_goes_on(
    task: Task, trained: tuple[Path, list[float]], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        fit(IRN(**SMALL, epochs=12), tmp_path, task, Losses(stop_before=21))
    assert (tmp_path / "checkpoint" / "last.ckpt").is_file()
    assert not (tmp_path / "heads.safetensors").exists()
    losses = Losses()
    fit(IRN(**SMALL, epochs=12), tmp_path, task, losses)
    assert len(losses.losses) == 4
    assert (tmp_path / "heads.safetensors").is_file()


def test_boundaries_do_not_depend_on_mirroring(trained: tuple[Path, list[float]]) -> None:
    refiner = ready(trained[0])
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    plain = refiner.edge(Image.fromarray(pixels))
    mirrored = refiner.edge(Image.fromarray(np.ascontiguousarray(pixels[:, ::-1])))
    assert plain.shape == (16, 24)
    torch.testing.assert_close(plain, mirrored.flip(1), rtol=0, atol=1e-5)
    assert 0 <= plain.min() < plain.max() <= 1


def test_scores_are_the_walk_divided_by_one_maximum(
    task: Task, trained: tuple[Path, list[float]]
) -> None:
    refiner = ready(trained[0], power=2, walk_radius=3, beta=4, steps=20)
    picture = next(p for p in task.pictures if len(p.labels or ()) > 1)
    seed = task.seed(picture)
    image = Image.open(picture.path)
    found = refiner.refine(picture.id, image, seed)
    maps = torch.from_numpy(seed.maps.astype(np.float32)) ** 2
    walked = random_walk(maps, refiner.edge(image), radius=3, beta=4, steps=20).numpy()
    np.testing.assert_allclose(found.maps, walked / walked.max(), atol=1e-3)
    assert found.maps.max() == 1
    assert found.size == seed.size
    assert (found.keys == seed.keys).all()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [(33, 500), (41, 1), (70, 83)])
def test_any_size(
    trained: tuple[Path, list[float]], tmp_path: Path, size: tuple[int, int], count: int
) -> None:
    refiner = ready(trained[0])
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    maps = rng.random((count, *grid_size(size))).astype(np.float16)
    found = refiner.refine("a", image, SeedRecord(np.arange(count), maps, size))
    assert found.maps.shape == maps.shape
    assert np.isfinite(found.maps).all()
    assert found.maps.min() >= 0
    assert found.maps.max() == 1
    save_seed(tmp_path / "a.npz", found)
    assert load_seed(tmp_path / "a.npz").full_size().shape == (count, *size)


def test_no_class_and_zero_maps(trained: tuple[Path, list[float]]) -> None:
    refiner = ready(trained[0])
    image = Image.new("RGB", (50, 30))
    empty = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 8, 13), np.float16), (30, 50))
    assert refiner.refine("a", image, empty).maps.shape == (0, 8, 13)
    zero = SeedRecord(np.arange(80), np.zeros((80, 8, 13), np.float16), (30, 50))
    found = refiner.refine("a", image, zero)
    assert found.maps.shape == (80, 8, 13)
    assert (found.maps == 0).all()


def test_maps_on_another_grid(trained: tuple[Path, list[float]]) -> None:
    image = Image.new("RGB", (50, 30))
    seed = SeedRecord(np.array([3]), np.ones((1, 30, 50), np.float16), (30, 50))
    assert ready(trained[0]).refine("a", image, seed).maps.shape == (1, 8, 13)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("size", [(97, 131), (33, 500)])
def test_network_on_any_backbone(name: str, size: tuple[int, int]) -> None:
    backbone = build_backbone(name, None).eval()
    network = RelationNetwork(stage_channels(backbone)).eval()
    with torch.no_grad():
        features = backbone.stages(torch.rand(2, 3, *size))
        assert network.edge(features, grid_size(size)).shape == (2, *grid_size(size))
        found = network.displacement(features, grid_size(size))
    assert found.shape == (2, 2, *grid_size(size))


def test_large_odd_picture() -> None:
    backbone = tiny_backbone().eval()
    network = RelationNetwork(stage_channels(backbone)).eval()
    with torch.no_grad():
        features = backbone.stages(torch.rand(1, 3, 639, 613))
        assert network.edge(features, (160, 154)).shape == (1, 160, 154)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    backbone = tiny_backbone().eval()
    network = RelationNetwork(stage_channels(backbone))  # in training, where it matters
    images = torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        together, alone = backbone.stages(images), backbone.stages(images[1:2])
        for part in (network.edge, network.displacement):
            torch.testing.assert_close(
                part(together, (12, 16))[1:2], part(alone, (12, 16)), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", THRESHOLDS)
def test_published_thresholds_by_name(name: str) -> None:
    refiner = IRN(thresholds=name)
    found = (refiner.conf_fg, refiner.conf_bg, refiner.background, refiner.power)
    assert found == THRESHOLDS[name]


def test_thresholds_follow_the_background_score_of_the_maps() -> None:
    refiner = IRN(seed_background=0.4, power=1)
    assert (refiner.conf_fg, refiner.conf_bg) == pytest.approx((0.52, 0.3))
    assert IRN(seed_background=0.4).background == pytest.approx(0.4**POWER)
    assert IRN().rule_of_thumb
    assert not IRN(background=0.2).rule_of_thumb
    assert not IRN(thresholds="lpcam").rule_of_thumb
    for extreme in (0, 1):
        refiner = IRN(seed_background=extreme)
        assert 0 < refiner.conf_bg <= refiner.conf_fg < 1


def test_single_values_take_precedence() -> None:
    refiner = IRN(thresholds="lpcam", conf_bg=0, background=0.9)
    assert (refiner.conf_fg, refiner.conf_bg, refiner.background) == (0.45, 0, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": "best"}, "choose from lpcam, irn, "),
        ({"conf_fg": 0.2, "conf_bg": 0.3}, r"^refiner\.conf_bg=0\.3: give at most"),
        ({"conf_fg": 1.2}, "should be less than or equal to 1"),
        ({"crop": 64}, r"^refiner\.crop=64: give a multiple"),
        ({"labels": "none"}, "should be 'par' or 'crf'"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IRN(**settings)


def test_what_results_depend_on() -> None:
    plain = IRN()
    inputs = dict(plain.inputs([]))
    assert json.loads(json.dumps(inputs)) == inputs
    assert IRN(background=0.1, source="cam").inputs([]) == inputs
    assert IRN(beta=3).inputs([]) != inputs
    assert IRN(beta=3, steps=2, walk_radius=3, power=2).training_inputs() == plain.training_inputs()
    for changed in ({"conf_fg": 0.9}, {"radius": 8}, {"epochs": 1}, {"scales": (1, 1)}):
        assert IRN(**changed).training_inputs() != plain.training_inputs()


def test_a_head_of_another_backbone(trained: tuple[Path, list[float]]) -> None:
    with pytest.raises(InputError, match="no trained refiner"):
        IRN(**SMALL).load(trained[0], build_backbone("test_efficientnet", None), "cpu")
