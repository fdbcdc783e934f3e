"""What a segmentation network is trained to make small."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.data.dataset import IGNORED

Grid = Literal["network", "picture"]


def label_loss(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    grid: Grid = "picture",
    balanced: bool = False,
) -> Tensor:
    """Cross-entropy of the labels that are known, 0 where none is.

    Args:
        scores: Scores before softmax ``(B, C + 1, h, w)``.
        labels: Labels ``(B, H, W)`` int64: 0 background, class index + 1, 255 unknown.
        weights: How much each pixel counts ``(B, H, W)``, not negative; None for alike.
        grid: Where the two are compared: scores brought to the ``picture``'s size, bilinear, or
            labels to the ``network``'s grid, nearest neighbour, as published for DeepLabV2.
        balanced: Half the mean over background and half that over objects, however many pixels
            either has, instead of the mean over all.

    Returns:
        A scalar.
    """
    if grid == "picture":
        size = labels.shape[1:]
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    else:
        labels = _nearest(labels.float(), scores.shape[2:]).long()
        weights = None if weights is None else _nearest(weights, scores.shape[2:])
    losses = F.cross_entropy(scores.float(), labels, reduction="none", ignore_index=IGNORED)
    known = (labels != IGNORED).float()
    weights = known if weights is None else weights * known
    if not balanced:
        return _mean(losses, weights)
    sides = [weights * (labels == 0), weights * (labels != 0)]
    there = torch.stack([(side.sum() > 0).float() for side in sides]).sum()
    return sum((_mean(losses, side) for side in sides), losses.new_zeros(())) / there.clamp_min(1)


def pyramid_loss(
    network: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    scales: Sequence[float],
    grid: Grid,
    balanced: bool,
) -> Tensor:
    """Sum of the losses of a picture, of it at smaller scales, and of the maximum of their scores.

    DeepLabV2's training; without further scales it is the loss of the picture alone.

    Args:
        network: Gives scores of pictures.
        images: Normalised pictures ``(B, 3, H, W)``.
        labels: See :func:`label_loss`.
        weights: Likewise.
        scales: Factors on the pictures' size besides 1.
        grid: Likewise.
        balanced: Likewise.
    """
    found = [network(images)]
    for scale in scales:
        smaller = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        found.append(network(smaller))
    if scales:
        size = found[0].shape[2:]
        brought = [F.interpolate(s, size, mode="bilinear", align_corners=False) for s in found[1:]]
        found.append(torch.stack([found[0], *brought]).amax(0))
    losses = [label_loss(s, labels, weights, grid=grid, balanced=balanced) for s in found]
    return torch.stack(losses).sum()


def _nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bring ``(B, H, W)`` to another size; the pixel under the middle of each new one stays."""
    return F.interpolate(values[:, None], tuple(size), mode="nearest-exact")[:, 0]


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)
