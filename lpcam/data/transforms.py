"""From PIL pictures to normalised tensors."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def rescale(image: Image.Image, scale: float) -> Image.Image:
    """Resize a picture by a factor, bicubic with antialiasing.

    Sides round half to even, as ``np.round`` does in the published code, but never to nothing.
    """
    width, height = (max(1, int(np.round(side * scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def normalize(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale an RGB picture's bytes to 0..1, subtract the mean and divide by the deviation.

    Returns:
        Tensor ``(3, H, W)`` float32; the arithmetic is float64, as in the published code.
    """
    pixels = (np.asarray(image, np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()


class TrainTransform:
    """Random scale, flip and crop for training the whole network.

    Args:
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        long_side: Range in pixels that the picture's longer side is resized to.
        crop: Side of the square crop in pixels; what sticks out is padded with zeros *after*
            normalisation, which is the mean colour.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], long_side: tuple[int, int], crop: int
    ) -> None:
        self.mean = mean
        self.std = std
        self.long_side = long_side
        self.crop = crop

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one RGB picture to ``(3, crop, crop)``; draws from torch's global generator."""
        low, high = self.long_side
        long_side = int(torch.randint(low, high + 1, ()))
        pixels = normalize(rescale(image, long_side / max(image.size)), self.mean, self.std)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        for dim in (1, 2):
            spare = pixels.shape[dim] - self.crop
            offset = int(torch.randint(0, abs(spare) + 1, ()))
            if spare > 0:
                pixels = pixels.narrow(dim, offset, self.crop)
            else:
                padding = (offset, -spare - offset)
                pixels = F.pad(pixels, padding if dim == 2 else (0, 0, *padding))
        return pixels
