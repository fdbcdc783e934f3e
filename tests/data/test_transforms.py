from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.transforms import TrainTransform, normalize, rescale

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # leaves bytes as they are
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def places(width: int, height: int) -> Image.Image:
    """A picture that tells where each pixel was: red its column, green its row, blue 200."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        # Halves go to the even side: 187.5, 562.5, 12.5, 13.5 and 2.5.
        ((375, 500), 0.5, (188, 250)),
        ((375, 500), 1.5, (562, 750)),
        ((25, 27), 0.5, (12, 14)),
        ((5, 500), 0.5, (2, 250)),
        ((333, 500), 2.0, (666, 1000)),
        ((333, 501), 1.0, (333, 501)),
        ((3, 1), 0.25, (1, 1)),
    ],
)
def test_sides_round_half_to_even(
    size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    assert rescale(Image.new("RGB", size), scale).size == expected
    assert rescale(Image.new("RGB", size[::-1]), scale).size == expected[::-1]


def test_rescale_is_bicubic() -> None:
    rng = np.random.default_rng(31)
    image = Image.fromarray(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8))
    for scale, size in ((0.5, (22, 15)), (1.5, (66, 45)), (1.0, (44, 30))):
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(np.asarray(rescale(image, scale)), expected)
    assert np.array_equal(np.asarray(rescale(image, 1.0)), np.asarray(image))


def test_normalize_by_hand() -> None:
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]], np.uint8))
    tensor = normalize(image, mean=(0.5, 0.0, 0.25), std=(0.5, 0.1, 1.0))
    # 51 / 255 is 0.2 and 102 / 255 is 0.4.
    expected = torch.tensor([[[-1.0, 1.0]], [[2.0, 4.0]], [[0.75, -0.25]]])
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=0)


def test_normalize_rounds_once() -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = normalize(image, mean, std)
    for channel, row, column in np.ndindex(3, 16, 16):
        exact = ((16 * row + column) / 255 - mean[channel]) / std[channel]
        assert tensor[channel, row, column].item() == np.float32(exact)


def content(pixels: Tensor) -> tuple[slice, slice]:
    """Rows and columns that are not padding, of a transformed picture of :func:`places`."""
    inside = pixels[2] != 0
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    assert inside[box].all()
    return box


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (12, 40), (20, 9)])
def test_a_square_crop_or_padding(size: tuple[int, int]) -> None:
    width, height = size
    crop = 16
    transform = TrainTransform(**PLAIN, long_side=(max(size), max(size)), crop=crop)
    torch.manual_seed(32)
    seen: set[tuple[int, int]] = set()
    flips: Counter[bool] = Counter()
    for _ in range(400):
        pixels = transform(places(width, height))
        assert pixels.shape == (3, crop, crop)
        rows, columns = content(pixels)
        assert rows.stop - rows.start == min(height, crop)
        assert columns.stop - columns.start == min(width, crop)
        outside = torch.ones(crop, crop).bool()
        outside[rows, columns] = False
        assert not pixels[:, outside].any()
        red, green = pixels[0, rows, columns].round(), pixels[1, rows, columns].round()
        assert (green.diff(dim=0) == 1).all()
        assert (green.diff(dim=1) == 0).all()
        assert (red.diff(dim=0) == 0).all()
        steps = set(red.diff(dim=1).flatten().tolist())
        assert steps in ({1.0}, {-1.0})
        flips[steps == {-1.0}] += 1
        top = int(green[0, 0]) if height > crop else rows.start
        left = int(red.min()) if width > crop else columns.start
        seen.add((top, left))
    assert 140 < flips[True] < 260
    spare = abs(height - crop), abs(width - crop)
    for axis in (0, 1):
        found = sorted({place[axis] for place in seen})
        assert (found[0], found[-1]) == (0, spare[axis])


@pytest.mark.parametrize("size", [(40, 30), (21, 60)])
def test_content_is_a_crop_of_the_resized_picture(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(33)
    image = Image.fromarray(rng.integers(1, 256, (*size[::-1], 3), dtype=np.uint8))
    low, high, crop = 20, 24, 10
    candidates: dict[bytes, int] = {}
    for side in range(low, high + 1):
        shape = tuple(round(length * side / max(size)) for length in size)
        resized = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
        for pixels in (resized, resized[:, ::-1]):
            height, width = pixels.shape[:2]
            for top in range(max(height - crop, 0) + 1):
                for left in range(max(width - crop, 0) + 1):
                    window = pixels[top : top + crop, left : left + crop]
                    candidates[np.ascontiguousarray(window).tobytes()] = side
    transform = TrainTransform(**PLAIN, long_side=(low, high), crop=crop)
    torch.manual_seed(34)
    sides: Counter[int] = Counter()
    for _ in range(300):
        pixels = transform(image).permute(1, 2, 0)
        rows = pixels.any(2).any(1)
        columns = pixels.any(2).any(0)
        window = pixels[rows][:, columns].round().to(torch.uint8).contiguous()
        sides[candidates[window.numpy().tobytes()]] += 1
    assert sorted(sides) == list(range(low, high + 1))
    assert min(sides.values()) > 30


def test_padding_is_zero_after_normalisation() -> None:
    transform = TrainTransform(**GREY, long_side=(8, 8), crop=12)
    torch.manual_seed(35)
    pixels = transform(Image.new("RGB", (8, 4), (255, 0, 255)))
    inside = pixels[0] == 1  # of white; black padding would be -1
    assert inside.sum() == 32
    assert (pixels[1, inside] == -1).all()
    assert not pixels[:, ~inside].any()


def test_torch_seed_decides() -> None:
    transform = TrainTransform(**GREY, long_side=(30, 60), crop=24)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([transform(places(50, 40)) for _ in range(4)])

    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))
    drawn = draw(1)
    assert not torch.equal(drawn[0], drawn[1])
