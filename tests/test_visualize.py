from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.errors import InputError
from lpcam.visualize import (
    draw_grid,
    draw_prototypes,
    heat_overlay,
    instance_overlay,
    overlay,
    to_pictures,
)


def test_pictures_come_back_from_normalised_tensors() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float()

    pictures = to_pictures(images, mean, std)

    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), pixels)


def test_values_outside_the_range_are_cut() -> None:
    (black, white) = to_pictures(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1),
                                 (0, 0, 0), (1, 1, 1))  # fmt: skip
    assert (black.getpixel((0, 0)), white.getpixel((0, 0))) == ((0, 0, 0), (255, 255, 255))


def test_an_overlay_has_the_size_of_the_picture_and_is_brightest_on_the_activation() -> None:
    picture = Image.new("RGB", (40, 20), (90, 90, 90))
    heat = torch.zeros(4, 8)
    heat[1, 5] = 1

    shown = np.asarray(overlay(picture, heat), np.float64).mean(2)

    assert shown.shape == (20, 40)
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert (row // 5, column // 5) == (1, 5)
    assert (shown[:, :15] == shown[0, 0]).all()


def test_a_map_of_the_pictures_size_is_laid_over_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 4), dtype=torch.uint8, generator=generator).numpy()
    heat = torch.rand(3, 4, generator=generator)

    shown = np.asarray(overlay(Image.fromarray(pixels), heat))

    grey = np.repeat(pixels[..., None] / 255, 3, 2)
    np.testing.assert_allclose(
        shown / 255, heat_overlay(grey, heat.numpy()), rtol=0, atol=0.51 / 255
    )


def test_several_maps_are_refused() -> None:
    with pytest.raises(InputError, match=r"heat: shape \(2, 4, 4\); give one map"):
        overlay(Image.new("RGB", (4, 4)), torch.zeros(2, 4, 4))


def test_a_grid_has_a_row_a_picture_and_a_column_a_title(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (9, 9), "blue")
    rows = [("first", [("LPCAM", large)]), ("second", [("picture", small), ("LPCAM", large)])]

    figure = draw_grid("Title", rows)
    figure.savefig(tmp_path / "grid.png")

    axes = np.reshape(figure.axes, (2, 2))
    assert [a.get_title() for a in axes[0]] == ["picture", "LPCAM"]
    assert [a.get_xlabel() for a in axes[:, 0]] == ["first", "second"]
    shown = [[np.asarray(image.get_array()).shape for image in a.get_images()] for a in axes.flat]
    assert shown == [[], [(9, 9, 3)], [(4, 8, 3)], [(9, 9, 3)]]
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to show"):
        draw_grid("Title", [])


def test_prototypes_show_the_most_similar_pictures_first() -> None:
    pictures = [Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 100, 200)]
    similarity = torch.full((3, 2, 2, 2), -1.0)
    similarity[[0, 1, 2], 0, 0, 0] = torch.tensor([0.25, 0.75, 0.5])
    similarity[[0, 1, 2], 1, 1, 1] = torch.tensor([0.5, -0.5, 0.0])

    figure = draw_prototypes(pictures, similarity, ["beak", "tail"], count=2)

    axes = np.reshape(figure.axes, (2, 2))
    # Where a prototype is dissimilar the picture shows through: black, medium or light grey.
    corners = [[float(a.get_images()[0].get_array()[7, 0].mean()) for a in row] for row in axes]
    assert corners[0][0] < corners[0][1]
    assert corners[1][0] < corners[1][1]
    captions = [a.get_xlabel() for a in axes[:, 0]]
    assert captions == ["beak: cosine 0.75", "tail: cosine 0.50"]


def test_each_instance_has_a_colour_and_a_white_end() -> None:
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 4:16, 3:15] = True
    masks[1, 4:16, 15:27] = True
    shown = instance_overlay(np.full((20, 30, 3), 0.5, np.float32), masks)
    inner = [shown[10, 8], shown[10, 20]]
    assert np.abs(inner[0] - inner[1]).max() > 0.3
    assert (shown[10, [3, 4, 13, 14, 15, 16, 26]] == 1).all()
    assert (shown[:3] == shown[0, 0]).all()
    assert shown[0, 0].max() < 1
    nothing = instance_overlay(np.zeros((4, 5, 3), np.float32), [])
    assert (nothing == nothing[0, 0]).all()
