"""Random crops for training: of a picture, and of its labels at the same place if it has any."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lpcam.data.dataset import IGNORED
from lpcam.data.transforms import normalize, rescale

# Draws the factor on the size (width, height) of a picture.
DrawScale = Callable[[tuple[int, int]], float]


def by_long_side(sides: Sequence[int]) -> DrawScale:
    """The longer side becomes a random whole number of pixels in a range, ends included."""
    low, high = sides
    return lambda size: int(torch.randint(low, high + 1, ())) / max(size)


def by_factor(factors: Sequence[float]) -> DrawScale:
    """A random factor in a range."""
    low, high = factors
    return lambda size: low + (high - low) * float(torch.rand(()))


def deit_augmentation(
    mean: Sequence[float], std: Sequence[float], *, crop: int
) -> Callable[[Image.Image], Tensor]:
    """What DeiT is trained with: a crop of random area and shape, RandAugment, random erasing.

    Args:
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        crop: Side of the square in pixels.

    Returns:
        Makes ``(3, crop, crop)`` of an RGB picture.
    """
    transform: Any = create_transform(
        crop,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        mean=tuple(mean),
        std=tuple(std),
    )
    return transform


def by_choice(factors: Sequence[float]) -> DrawScale:
    """One of these factors, each as likely."""
    return lambda size: factors[int(torch.randint(len(factors), ()))]


class _CellCrop(v2.RandomCrop):
    """A crop that starts at a multiple of a cell's side, counted from the picture's corner."""

    def __init__(self, crop: int, cell: int) -> None:
        fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        super().__init__(crop, pad_if_needed=True, fill=fill)
        self.cell = cell

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        for side, padded in zip(("left", "top"), params["padding"], strict=False):
            beyond = (params[side] - padded) % self.cell
            params[side] -= beyond if beyond <= params[side] else beyond - self.cell
        return params


class RandomCrop:
    """A square of a randomly scaled and mirrored picture.

    What sticks out is padded: the picture with zeros *after* normalisation, which is the mean
    colour, the labels with 255. Draws from torch's global generator.

    Args:
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        scale: Draws the factor on a picture's size.
        crop: Side of the square in pixels.
        cell: Crops start at multiples of so many pixels, so that labels which are constant in cells
            of that size keep their cells.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: DrawScale,
        crop: int,
        cell: int = 1,
    ) -> None:
        self.mean = mean
        self.std = std
        self.scale = scale
        self.side = crop
        self.crop = v2.Compose([_CellCrop(crop, cell), v2.RandomHorizontalFlip()])

    def __call__(self, image: Image.Image) -> Tensor:
        """Crop one RGB picture: ``(3, crop, crop)``."""
        return self.crop(self._picture(image, self.scale(image.size))).as_subclass(Tensor)

    def whole(self, image: Image.Image) -> Tensor:
        """The whole of one RGB picture in the square: no chance decides, for validation."""
        picture = self._picture(image, self.side / max(image.size))
        height, width = picture.shape[1:]
        return F.pad(picture.as_subclass(Tensor), (0, self.side - width, 0, self.side - height))

    def both(self, image: Image.Image, *labels: Image.Image) -> tuple[Tensor, ...]:
        """Crop a picture ``(3, crop, crop)`` and labels of its pixels ``(crop, crop)`` int64."""
        picture = self._picture(image, self.scale(image.size))
        size = (picture.shape[2], picture.shape[1])
        resized = [np.array(one.resize(size, Image.Resampling.NEAREST), np.int64) for one in labels]
        masks = [tv_tensors.Mask(torch.from_numpy(one)) for one in resized]
        return tuple(cropped.as_subclass(Tensor) for cropped in self.crop(picture, *masks))

    def _picture(self, image: Image.Image, scale: float) -> tv_tensors.Image:
        return tv_tensors.Image(normalize(rescale(image, scale), self.mean, self.std))
