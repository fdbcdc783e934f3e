"""Pairs of nearby cells that are known to belong together or not, and the loss on their affinity.

What IRN and PSA have in common; see :mod:`lpcam.refiners.random_walk` for the papers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lpcam.data.dataset import IGNORED
from lpcam.refiners.random_walk import at_offset, pair_offsets

EPS = 1e-5


class PairLabels(NamedTuple):
    """What is known of each pair ``(B, O, h', w')`` bool, cells as in ``edge_affinity``.

    A pair of which one cell is ignored is none of the three.

    Attributes:
        background: Both cells are background.
        foreground: Both are the same class.
        different: They differ.
    """

    background: Tensor
    foreground: Tensor
    different: Tensor


def pair_labels(labels: Tensor, radius: int) -> PairLabels:
    """Compare each cell's label with those of its neighbours.

    Args:
        labels: Labels ``(B, h, w)`` integer: 0 background, class index + 1, 255 ignored.
        radius: See :func:`~lpcam.refiners.random_walk.pair_offsets`.
    """
    first = at_offset(labels, (0, 0), radius)[:, None]
    second = torch.stack([at_offset(labels, o, radius) for o in pair_offsets(radius)], 1)
    known = (first != IGNORED) & (second != IGNORED)
    equal = known & (first == second)
    return PairLabels(equal & (first == 0), equal & (first > 0), known & (first != second))


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values that a mask of the same shape selects; 0 if there are none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def affinity_loss(affinity: Tensor, pairs: PairLabels) -> Tensor:
    """Cross entropy of affinities (IRN, Eq. 7; PSA, Eq. 4 to 7).

    Half of it is the mean over equal pairs, those of background and those of classes counting the
    same, and half the mean over different ones.

    Args:
        affinity: Affinities ``(B, O, h', w')`` in 0..1.
        pairs: What they should be.
    """
    attraction = -(affinity + EPS).log()
    repulsion = -(1 + EPS - affinity).log()
    equal = mean_where(attraction, pairs.background) + mean_where(attraction, pairs.foreground)
    return equal / 4 + mean_where(repulsion, pairs.different) / 2
