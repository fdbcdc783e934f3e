"""Objects of a class told apart by displacements (section 4.3 of IRN's paper), and cut out.

Background and objects of other classes are told apart by scores, as in masks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from lpcam.seeds.record import SeedRecord

# As published.
STEPS = 300
NEAR = 2.5  # cells
SMALLEST = 0.01  # of a picture
STILL = 0.01  # cells


class Instance(NamedTuple):
    """One object that was found.

    Attributes:
        label: Class index.
        mask: Where it is ``(H, W)`` bool.
        score: The highest score of its pixels, 0..1.
    """

    label: int
    mask: np.ndarray
    score: float


def follow(displacement: Tensor, steps: int = STEPS) -> Tensor:
    """Where each cell gets to that goes where displacements lead, between cells bilinear.

    Args:
        displacement: Rows and columns ``(2, h, w)`` to the next place, in cells.
        steps: Steps at most; it ends as soon as no cell moves by more than :data:`STILL`.

    Returns:
        The places' rows and columns ``(2, h, w)``, within the grid.
    """
    last = displacement.new_tensor(displacement.shape[1:])[:, None, None] - 1
    sides = (torch.arange(side) for side in displacement.shape[1:])
    places = torch.stack(torch.meshgrid(*sides, indexing="ij")).to(displacement)
    for _ in range(steps):
        relative = (2 * places / last.clamp_min(1) - 1).flip(0).permute(1, 2, 0)
        ways = F.grid_sample(displacement[None], relative[None], align_corners=True)[0]
        before, places = places, torch.minimum((places + ways).clamp_min(0), last)
        if (places - before).abs().max() < STILL:
            break
    return places


def group_cells(displacement: Tensor) -> np.ndarray:
    """Which object each cell belongs to, as displacements say.

    A centre is a connected region of displacements shorter than :data:`NEAR`; cells that get to the
    same one are a group.

    Args:
        displacement: ``(2, h, w)``, see :func:`follow`.

    Returns:
        Numbers ``(h, w)`` int; 0 is the group of those that get to no centre.
    """
    centres, _ = ndimage.label(displacement.norm(dim=0).numpy() < NEAR)
    rows, columns = follow(displacement).round().long().numpy()
    return centres[rows, columns]


def divide_maps(maps: Tensor, groups: np.ndarray, least: float) -> tuple[list[int], Tensor]:
    """Restrict each map to each group of cells.

    Args:
        maps: Maps ``(K, h, w)``.
        groups: Numbers ``(h, w)`` from :func:`group_cells`.
        least: What a restricted map has to exceed somewhere; others are left out.

    Returns:
        For each of the N restricted maps the place of its own among the K, and the maps
        ``(N, h, w)``.
    """
    owners, parts = [], []
    for number in np.unique(groups):
        restricted = maps * torch.from_numpy(groups == number)
        for place in (restricted.amax((1, 2)) > least).nonzero()[:, 0].tolist():
            owners.append(place)
            parts.append(restricted[place])
    return owners, torch.stack(parts) if parts else maps[:0]


def cut_out(scores: SeedRecord, background: float) -> list[Instance]:
    """The connected parts of what each map wins.

    Parts smaller than :data:`SMALLEST` are left out.

    Args:
        scores: A map an instance, so that several may have the same class; or a map a class.
        background: The score that a pixel has to exceed.

    Returns:
        The instances, the highest score first.
    """
    maps = scores.full_size()
    if not len(maps):
        return []
    highest, winner = maps.max(0)
    winner[highest <= background] = -1
    found = []
    for place, label in enumerate(scores.keys.tolist()):
        parts, _ = ndimage.label(winner.numpy() == place)
        areas = np.bincount(parts.ravel())
        for number in (np.flatnonzero(areas[1:] >= SMALLEST * parts.size) + 1).tolist():
            mask = parts == number
            found.append(Instance(label, mask, float(maps[place].numpy()[mask].max())))
    return sorted(found, key=lambda instance: -instance.score)
