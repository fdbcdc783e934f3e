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


def to_bytes(image: Image.Image) -> Tensor:
    """The bytes of an RGB picture ``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize_bytes(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale bytes to 0..1, subtract the mean and divide by the deviation.

    A table of the 256 values does it, so the arithmetic is float64, as in the published code, on
    every device, and costs a look.

    Args:
        pixels: Bytes ``(..., 3, H, W)`` on any device.
        mean: Per-channel mean.
        std: Per-channel standard deviation.

    Returns:
        Of the same shape, float32.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    table = torch.stack([(levels - m) / s for m, s in zip(mean, std, strict=True)])
    rows = table.float().to(pixels.device).unbind()
    channels = zip(rows, pixels.unbind(-3), strict=True)
    looked_up = [  # several times faster than indexing
        row.index_select(0, channel.flatten().int()).view(channel.shape)
        for row, channel in channels
    ]
    return torch.stack(looked_up, -3)


def normalize(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture as networks take it ``(3, H, W)``, see :func:`normalize_bytes`."""
    return normalize_bytes(to_bytes(image), mean, std)
