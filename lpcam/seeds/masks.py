"""From maps to masks: the rule that decides a pixel."""

import numpy as np
import torch
from torch import Tensor


def seed_mask(maps: Tensor, keys: np.ndarray, background: float) -> np.ndarray:
    """Turn maps into a mask: the strongest class where it exceeds a constant background score.

    Args:
        maps: Maps ``(L, H, W)`` in 0..1.
        keys: Class indices ``(L,)``.
        background: The score that a class has to exceed.

    Returns:
        Mask ``(H, W)`` uint8: 0 background, class index + 1 elsewhere.
    """
    mask = np.zeros(maps.shape[1:], np.uint8)
    highest = np.full(maps.shape[1:], background, np.float32)
    # Five times as fast as torch's maximum with its place, for pictures have few classes.
    for key, scores in zip(keys, maps.numpy(), strict=True):
        mask[scores > highest] = key + 1
        np.maximum(highest, scores, out=highest)
    return mask


def mark_unsure(mask: np.ndarray, maps: Tensor, background: float, band: float) -> np.ndarray:
    """Set pixels of a mask to 255 where the strongest score is close to the background score.

    Args:
        mask: Mask ``(H, W)`` from :func:`seed_mask`.
        maps: The maps ``(L, H, W)`` it was made from.
        background: The background score it was made with.
        band: How far from it a score has to be to count as sure; 0 marks nothing.

    Returns:
        A new mask ``(H, W)`` uint8.
    """
    if not len(maps) or band == 0:
        return mask
    sure = (maps.amax(0) - background).abs().numpy() >= band
    return np.where(sure, mask, 255).astype(np.uint8)


def scores_of_labels(maps: Tensor, labels: Tensor) -> Tensor:
    """Scores whose mask at background 0.5 is given: for rules that decide labels, not scores.

    Each map is halved, and the map of a pixel's label lifted by 0.5, so that a sweep over other
    thresholds still tells strong from weak. The label holds in float16, as records are stored.

    Args:
        maps: Maps in 0..1 ``(L, H, W)``.
        labels: ``(H, W)``, integers: 0 background, place among the L maps + 1 elsewhere.

    Returns:
        Scores ``(L, H, W)`` in 0..1.
    """
    wins = torch.arange(1, len(maps) + 1)[:, None, None] == labels
    # Above 0.5, float16 goes in steps of 2^-11.
    return torch.where(wins, 0.5 + (maps / 2).clamp_min(2**-11), maps / 2)
