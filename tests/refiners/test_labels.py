import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.refiners.labels import affinity_labels, cell_means, relation_labels
from lpcam.refiners.par import PAR
from lpcam.seeds.record import SeedRecord

METHODS = ["par", pytest.param("crf", marks=pytest.mark.filterwarnings("ignore"))]


def need(method: str) -> None:
    if method == "crf":
        pytest.importorskip("pydensecrf.densecrf")


def three_bands(
    values: tuple[float, float, float], key: int = 79
) -> tuple[Image.Image, SeedRecord]:
    """A picture of three bands of 24 columns with one score each, at the picture's resolution."""
    pixels = np.zeros((32, 72, 3), np.uint8)
    maps = np.zeros((1, 32, 72), np.float16)
    for band, value in enumerate(values):
        pixels[:, 24 * band : 24 * band + 24] = (90 * band, 200 - 80 * band, 60)
        maps[0, :, 24 * band : 24 * band + 24] = value
    return Image.fromarray(pixels), SeedRecord(np.array([key]), maps, (32, 72))


@pytest.mark.parametrize("method", METHODS)
def test_sure_open_and_background(method: str) -> None:
    need(method)
    image, seed = three_bands((0.9, 0.5, 0.1))
    labels = relation_labels(image, seed, method, conf_fg=0.7, conf_bg=0.3)
    assert labels.dtype == np.uint8
    inner = labels[8:24]
    assert (inner[:, 4:20] == 80).all()
    assert (inner[:, 28:44] == 255).all()
    assert (inner[:, 52:68] == 0).all()


def test_one_refinement_serves_both_thresholds() -> None:
    """The published way stacks a constant background and refines each stack."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    seed = SeedRecord(np.array([2, 7]), rng.random((2, 5, 6)).astype(np.float16), (20, 24))
    masks = []
    for threshold in (0.6, 0.4):
        scores = np.concatenate([np.full((1, 20, 24), threshold), seed.full_size().numpy()])
        refined = PAR().refine("a", image, SeedRecord(np.arange(3), scores, (20, 24))).full_size()
        masks.append(np.array([0, 3, 8])[refined.argmax(0).numpy()])
    sure, possible = masks
    expected = np.where(sure > 0, sure, np.where(possible > 0, 255, 0))
    found = relation_labels(image, seed, "par", conf_fg=0.6, conf_bg=0.4)
    assert (found == expected).mean() > 0.995  # a score at the threshold may fall on either side
    assert set(np.unique(found)) == {0, 3, 8, 255}


@pytest.mark.parametrize("method", METHODS)
def test_affinity_labels(method: str) -> None:
    need(method)
    # Background at power 0.5 and 2: 0.32 and 0.01, 0.71 and 0.25, 0.95 and 0.81.
    image, seed = three_bands((0.9, 0.5, 0.1))
    labels = affinity_labels(image, seed, method, low=0.5, high=2, stride=8)
    assert labels.shape == (32, 72)
    assert labels.dtype == np.uint8
    inner = labels[8:24]
    assert (inner[:, :16] == 80).all()
    assert (inner[:, 56:] == 0).all()
    if method == "par":
        assert (inner[:, 32:40] == 255).all()


def test_affinity_labels_are_constant_in_cells() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (19, 30, 3), dtype=np.uint8))
    seed = SeedRecord(np.array([0, 4]), rng.random((2, 5, 8)).astype(np.float16), (19, 30))
    labels = affinity_labels(image, seed, "par", low=0.4, high=1.5, stride=8)
    assert labels.shape == (19, 30)
    for y in range(0, 19, 8):
        for x in range(0, 30, 8):
            assert len(np.unique(labels[y : y + 8, x : x + 8])) == 1
    assert len(np.unique(labels)) > 1


def test_cell_means() -> None:
    scores = torch.rand(2, 5, 7, dtype=torch.float64)
    found = cell_means(scores, 4)
    for y in range(2):
        for x in range(2):
            cell = scores[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            torch.testing.assert_close(found[:, y, x], cell.mean((1, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_no_class_is_all_background(method: str) -> None:
    need(method)
    image = Image.new("RGB", (50, 13))
    seed = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 4, 13), np.float16), (13, 50))
    for labels in (
        relation_labels(image, seed, method, conf_fg=0.7, conf_bg=0.3),
        affinity_labels(image, seed, method, low=0.5, high=2, stride=8),
    ):
        assert labels.shape == (13, 50)
        assert (labels == 0).all()


def test_zero_maps_are_all_background() -> None:
    image = Image.new("RGB", (50, 13))
    seed = SeedRecord(np.arange(80), np.zeros((80, 4, 13), np.float16), (13, 50))
    assert (relation_labels(image, seed, "par", conf_fg=0.7, conf_bg=0.3) == 0).all()
    assert (affinity_labels(image, seed, "par", low=0.5, high=2, stride=8) == 0).all()
