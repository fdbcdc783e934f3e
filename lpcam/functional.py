"""The equations of LPCAM as pure tensor functions.

Symbols follow the paper (Chen and Sun, "Extracting Class Activation Maps from Non-Discriminative
Features as well", CVPR 2023): ``f(x)`` are the local features of a picture, ``w`` the weights of
the linear classifier on their mean. B pictures, C classes, D channels, a grid of h x w positions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_activation_map(features: Tensor, weight: Tensor) -> Tensor:
    """Plain CAM, ``ReLU(w . f)``: Eq. 1 before its division by the maximum.

    Args:
        features: Local features ``(B, D, h, w)``.
        weight: Class weights ``(C, D)``.

    Returns:
        Maps ``(B, C, h, w)``, not normalised.
    """
    return F.conv2d(features, weight[:, :, None, None]).relu()


def prototype_directions(
    class_prototypes: Sequence[Tensor], context_prototypes: Sequence[Tensor]
) -> Tensor:
    """Collapse all prototypes of a class into the one vector that scores it.

    The mean over prototypes of a cosine similarity (Eq. 4 and 5) is linear in the unit prototypes,
    so foreground minus context (Eq. 6) is a single dot product of the unit feature with
    ``d_c = mean_j p_j / |p_j| - mean_m b_m / |b_m|``. This is exact, not an approximation.

    Args:
        class_prototypes: For each of C classes its prototypes ``(P_c, D)``.
        context_prototypes: For each class its context prototypes ``(Q_c, D)``. A side without
            prototypes (``P_c`` or ``Q_c`` is 0) contributes nothing.

    Returns:
        Directions ``(C, D)``.
    """
    return torch.stack(
        [
            _mean_unit(foreground) - _mean_unit(context)
            for foreground, context in zip(class_prototypes, context_prototypes, strict=True)
        ]
    )


def _mean_unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1).sum(0) / max(len(vectors), 1)


def local_prototype_map(features: Tensor, directions: Tensor) -> Tensor:
    """Signed LPCAM ``A_c``: mean cosine to the class prototypes minus that to the context (Eq. 6).

    Args:
        features: Local features ``(B, D, h, w)``. A zero feature scores 0.
        directions: One vector a class ``(C, D)``, see :func:`prototype_directions`.

    Returns:
        Maps ``(B, C, h, w)`` in -2..2.
    """
    # Dividing C maps by the norm is cheaper than dividing D channels, and the same. Torch's
    # vector_norm takes four times as long along the channels.
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = wide.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt().to(features.dtype)
    norm = norm.clamp_min(torch.finfo(features.dtype).tiny)
    return F.conv2d(features, directions[:, :, None, None]) / norm


def normalize_maps(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """ReLU, then divide each map by its own maximum (the division of Eq. 1 and 6).

    Args:
        maps: Maps ``(..., h, w)``.
        eps: Added to the maximum. With 0 the maximum becomes exactly 1, as in the published code.

    Returns:
        Maps of the same shape in 0..1. An all-zero map stays zero whatever ``eps`` is; the
        published code makes it NaN.
    """
    maps = maps.relu()
    divisor = maps.amax((-2, -1), keepdim=True) + eps
    return maps / torch.where(divisor > 0, divisor, 1)


def merge_scales(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Bring the maps of several scales to one size and add them.

    ReLU does not commute with resizing: rectify each scale's maps first, on their own grid.

    Args:
        maps: For each scale ``(N, h, w)``, the grids differing.
        size: Height and width of the result.

    Returns:
        Sums ``(N, *size)``.
    """
    return torch.stack(
        [F.interpolate(m[None], size, mode="bilinear", align_corners=False)[0] for m in maps]
    ).sum(0)


def own_prototype_maps(values: Tensor, features: Tensor) -> Tensor:
    """How much more a position is like what a map holds in its own picture than like the rest.

    Each map has two prototypes in its picture, the means of unit features weighted by the map and
    by 1 - map; a position scores the cosine to the first minus that to the second. Other pictures
    tell what a class looks like, these what this animal looks like.

    Args:
        values: V maps of a picture in 0..1 ``(..., V, h, w)``, on the features' grid.
        features: Its local features ``(..., D, h, w)``.

    Returns:
        ``(..., V, h, w)`` in 0..1, after ReLU and division by the maximum.
    """
    unit = F.normalize(features, dim=-3).flatten(-2).to(values.dtype)
    inside = values.flatten(-2)
    here, rest = (F.normalize(weight @ unit.mT, dim=-1) for weight in (inside, 1 - inside))
    rest = rest * inside.any(-1, keepdim=True)  # of a map of nothing nothing spreads
    return normalize_maps(((here - rest) @ unit).unflatten(-1, features.shape[-2:]))


def propagate(
    values: Tensor,
    features: Tensor,
    stage: Tensor,
    *,
    sharpness: float,
    stage_weight: float,
    own_share: float = 0.0,
    beside: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
    block: int = 2**22,
) -> Tensor:
    """One step between a picture's own positions: each takes the mean of all, by likeness.

    ``out(x) = sum_y softmax_y(s (cos(f(x), f(y)) + a cos(g(x), g(y)))) value(y)`` with the local
    features f, which know what is where, and those of an earlier and finer stage g, which know
    where it ends. That is attention without a learnt part. Nothing of it is trained.

    Positions x lie on the stage's grid, positions y on that of the features, where values and stage
    are averaged: a quarter of the products where one grid is twice as fine as the other.

    Args:
        values: V maps of a picture ``(..., V, H, W)``, on any grid.
        features: Local features ``(..., D, h, w)``.
        stage: Features of the earlier stage ``(..., E, h', w')``, h' and w' not below h and w.
        sharpness: The s above; 0 makes every position the mean.
        stage_weight: The a above.
        own_share: How much of a value is that of :func:`own_prototype_maps`, before the step.
        beside: Values, features and stage of further pictures whose positions y take part, such as
            the frames of a video before and after this one.
        block: Pairs of positions of a picture at a time; bounds the memory.

    Returns:
        ``(..., V, h', w')``, in the precision of the values.
    """
    root, fine = stage_weight**0.5, stage.shape[-2:]
    here = F.normalize(resize(F.normalize(features, dim=-3), fine), dim=-3)
    queries = torch.cat([here, root * F.normalize(stage, dim=-3)], -3).flatten(-2)
    keys, known = [], []
    for maps, local, early in ((values, features, stage), *beside):
        coarse, unit = local.shape[-2:], F.normalize(local, dim=-3)
        averaged = resize(early, coarse, antialias=True)
        keys.append(torch.cat([unit, root * F.normalize(averaged, dim=-3)], -3).flatten(-2))
        averaged = resize(maps, coarse, antialias=True)
        if own_share:
            own = own_prototype_maps(averaged, unit)
            averaged = (1 - own_share) * averaged + own_share * own
        known.append(averaged.flatten(-2).mT)
    all_keys = sharpness * torch.cat(keys, -1)
    all_known = torch.cat(known, -2)
    rows = max(block // all_keys.shape[-1], 1)
    found = [
        (part.mT @ all_keys).softmax(-1).to(all_known.dtype) @ all_known
        for part in queries.split(rows, dim=-1)
    ]
    return torch.cat(found, -2).mT.unflatten(-1, fine)


def resize(maps: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """Bring maps ``(..., N, H, W)`` to another size, bilinear; those of that size stay."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    whole = F.interpolate(
        maps.reshape(-1, *maps.shape[-3:]), list(size), mode="bilinear", antialias=antialias
    )
    return whole.reshape(*maps.shape[:-2], *size)
