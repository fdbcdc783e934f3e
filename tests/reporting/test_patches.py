from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.reporting.patches import PrototypeView, crop, crop_all


@pytest.mark.parametrize(
    ("centre", "top", "left"),
    [
        ((0.5, 0.5), 108, 124),  # in the middle of 288 x 320
        ((0.0, 0.0), 0, 0),
        ((1.0, 1.0), 216, 248),
        ((0.25, 0.9), 36, 248),
    ],
)
def test_a_patch_is_a_quarter_of_the_shorter_side_inside_the_picture(
    centre: tuple[float, float], top: int, left: int
) -> None:
    rows, columns = np.mgrid[:288, :320]
    pixels = np.stack([rows % 256, columns % 256, rows // 256 + columns // 256], -1)
    image = Image.fromarray(pixels.astype(np.uint8))

    # A quarter of 288 is 72, the size that is shown: nothing is interpolated.
    np.testing.assert_array_equal(crop(image, centre), pixels[top : top + 72, left : left + 72])


def test_a_picture_smaller_than_a_patch_is_enlarged() -> None:
    assert crop(Image.new("RGB", (7, 3)), (0.5, 0.5)).size == (72, 72)


def view(*patches: tuple[Picture, tuple[float, float]]) -> PrototypeView:
    return PrototypeView("bird", "class", 0, 0.5, 10, True, patches)


@pytest.fixture
def grey(tmp_path: Path) -> list[Picture]:
    """Pictures of one grey each, whose number is the grey."""
    pictures = []
    for value in (10, 20, 30):
        path = tmp_path / f"{value}.png"
        Image.new("L", (80, 80), value).save(path)
        pictures.append(Picture(str(value), path, ()))
    return pictures


def test_each_prototype_gets_its_patches_in_order(grey: list[Picture]) -> None:
    places = [(picture, (0.5, 0.5)) for picture in grey]

    found = crop_all([view(places[2], places[0]), view(), view(places[0], places[0], places[1])])

    values = [[patch.getpixel((0, 0))[0] for patch in patches] for patches in found]
    assert values == [[30, 10], [], [10, 10, 20]]


def test_very_many_prototypes_get_fewer_patches(grey: list[Picture]) -> None:
    places = [(picture, (0.5, 0.5)) for picture in grey]

    found = crop_all([view(*places)] * 700)

    assert {len(patches) for patches in found} == {2}
    assert found[0][1].getpixel((0, 0))[0] == 20
