from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy import ndimage

from lpcam.data.shapes import Shapes

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "shapes.yaml"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    shapes = Shapes(tmp_path_factory.mktemp("shapes"), train=16, val=4, sizes=[64, 80])
    shapes.prepare()
    return shapes


def read(dataset, picture):
    """The picture, its mask and its parts as arrays."""
    image = np.asarray(Image.open(picture.path), np.float64)
    parts = np.asarray(Image.open(dataset.root / "Parts" / f"{picture.id}.png"))
    return image, dataset.mask(picture), parts


def test_parts_cover_exactly_what_the_mask_covers(dataset):
    for picture in dataset.pictures("train") + dataset.pictures("val"):
        _, mask, parts = read(dataset, picture)
        assert np.array_equal(parts > 0, mask > 0)
        for label in picture.labels:
            assert set(np.unique(parts[mask == label + 1])) == {1, 2}


def test_a_head_is_a_disc_that_is_smaller_than_the_body(tmp_path):
    shapes = Shapes(tmp_path, train=8, val=1, sizes=[96], pair_probability=0)
    shapes.prepare()
    for picture in shapes.pictures("train"):
        _, mask, parts = read(shapes, picture)
        rows, columns = np.nonzero(parts == 1)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(int(height) - int(width)) <= 1
        assert len(rows) == pytest.approx(np.pi / 4 * height * width, rel=0.06)
        assert (parts == 2).sum() > 1.5 * len(rows)
        assert ndimage.label(mask)[1] == 1


def test_only_the_head_tells_the_class(tmp_path):
    shapes = Shapes(tmp_path, train=24, val=1, sizes=[96], pair_probability=0)
    shapes.prepare()
    means = {1: {}, 2: {}}
    for picture in shapes.pictures("train"):
        image, _, parts = read(shapes, picture)
        for part in means:
            inner = ndimage.binary_erosion(parts == part, iterations=2)
            means[part].setdefault(picture.labels[0], []).append(image[inner].mean(0))

    def furthest_within(colours):
        return max(np.abs(np.ptp(np.array(rows), axis=0)).max() for rows in colours.values())

    def nearest_between(colours):
        centres = [np.mean(rows, 0) for rows in colours.values()]
        return min(np.abs(a - b).max() for i, a in enumerate(centres) for b in centres[i + 1 :])

    assert set(means[1]) == {0, 1, 2, 3}
    assert nearest_between(means[1]) > 2 * furthest_within(means[1])
    assert nearest_between(means[2]) < furthest_within(means[2])


@pytest.mark.parametrize("span", [[0.65, 1.0], [0.5, 0.5]])
def test_a_lone_creature_spans_what_is_asked(tmp_path, span):
    shapes = Shapes(tmp_path, train=24, val=1, pair_probability=0, single_span=span)
    shapes.prepare()
    for picture in shapes.pictures("train"):
        mask = shapes.mask(picture)
        rows, columns = np.nonzero(mask)
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert span[0] * min(mask.shape) - 2 <= longer <= span[1] * min(mask.shape) + 1


def test_pair_probability_is_obeyed_at_its_ends(tmp_path):
    for probability, number in ((0, 1), (1, 2)):
        shapes = Shapes(tmp_path, train=10, val=1, sizes=[64], pair_probability=probability)
        shapes.prepare()
        for index in range(10):
            xml = (shapes.root / "Annotations" / f"train_{index:05d}.xml").read_text()
            assert xml.count("<object>") == number


def test_a_tied_class_stands_on_its_background(tmp_path):
    """Water is the one texture that is blue: tied to ringheads, and to no other class."""

    def share_on_water(probability):
        shapes = Shapes(
            tmp_path, train=48, val=1, sizes=[48], pair_probability=0,
            context_probability=probability,
        )  # fmt: skip
        shapes.prepare()
        wet = []
        for picture in shapes.pictures("train"):
            image, mask, _ = read(shapes, picture)
            red, _, blue = image[mask == 0].mean(0)
            if picture.labels == (0,):
                wet.append(blue > red + 20)
        return np.mean(wet)

    assert share_on_water(1) == 1
    assert 0 < share_on_water(0) < 0.7


def test_the_config_says_what_the_code_does(tmp_path):
    config = OmegaConf.create({"paths": {"data": str(tmp_path)}, "dataset": OmegaConf.load(CONF)})
    configured = instantiate(config.dataset, _convert_="all")
    assert isinstance(configured, Shapes)
    assert configured.root == Shapes(tmp_path / "shapes").root
    assert configured.settings == Shapes(tmp_path / "shapes").settings
    assert configured.map_splits == ("train", "val")
