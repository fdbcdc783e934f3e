import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.transforms import normalize, rescale


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
