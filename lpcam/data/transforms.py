"""From PIL pictures to normalised tensors."""

from collections.abc import Sequence

import numpy as np
import torch
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
