"""Scaled and mirrored views of pictures that are tensors already."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import InputError

# Pairs: scale, whether mirrored.
Views = Iterable[tuple[float, bool]]
SINGLE_VIEW: Views = ((1.0, False),)
PAPER_VIEWS: Views = tuple(itertools.product((0.5, 1.0, 1.5, 2.0), (False, True)))


def check_pictures(images: Tensor) -> None:
    """Raise an InputError unless these are normalised pictures ``(B, 3, H, W)``."""
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images: {images.dtype} of shape {tuple(images.shape)}; "
            "give normalised pictures (B, 3, H, W)"
        )


def view_features(
    extract: Callable[[Tensor], Tensor], images: Tensor, views: Views
) -> Iterator[Tensor]:
    """Local features of all views, from one forward pass a scale.

    Args:
        extract: Gives features ``(B, D, h, w)`` of pictures ``(B, 3, H, W)``.
        images: The pictures at scale 1.
        views: The views in any order.

    Yields:
        For each scale, the smallest first, ``(V, B, D, h, w)``; those of mirror images are mirrored
        back.

    Raises:
        InputError: There is no view, or a scale is not positive.
    """
    ordered = sorted(set(views))
    if not ordered or ordered[0][0] <= 0:
        raise InputError(f"views={ordered}: give pairs (scale above 0, whether mirrored)")
    for scale, group in itertools.groupby(ordered, key=lambda view: view[0]):
        scaled = images
        if scale != 1:
            size = [max(round(side * scale), 1) for side in images.shape[2:]]
            # The CPU resizes nothing in half precision.
            wide = images.to(torch.promote_types(images.dtype, torch.float32))
            scaled = F.interpolate(wide, size, mode="bilinear", antialias=True)
        flips = [mirrored for _, mirrored in group]
        features = extract(torch.cat([scaled.flip(3) if flip else scaled for flip in flips]))
        parts = features.chunk(len(flips))
        yield torch.stack([p.flip(3) if flip else p for p, flip in zip(parts, flips, strict=True)])
