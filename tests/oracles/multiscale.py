"""Slow reference for maps over scales and mirrored views: one class of one picture at a time."""

import numpy as np

from tests.oracles.activation import class_activation_map, local_prototype_map, normalize_map
from tests.oracles.interpolation import bilinear


def _merged(rectified: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Sum over scales on the grid of every fourth row and column, divided by its maximum."""
    grid = (len(range(0, size[0], 4)), len(range(0, size[1], 4)))
    total = np.zeros(grid)
    for values in rectified:
        total += bilinear(values, grid)
    return normalize_map(total, 1e-5)


def plain_map(scales: list[np.ndarray], weight: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class activation map; each view is rectified, then the views are added.

    Args:
        scales: For each scale, features of the views ``(V, D, h, w)``.
        weight: The class's weights ``(D,)``.
        size: Height and width of the picture.
    """
    rectified = []
    for views in scales:
        values = np.zeros(views.shape[2:])
        for view in views.astype(np.float64):
            values += class_activation_map(view[None], weight[None])[0, 0]
        rectified.append(values)
    return _merged(rectified, size)


def prototype_map(
    scales: list[np.ndarray],
    own: np.ndarray,
    context: np.ndarray,
    offset: float,
    size: tuple[int, int],
) -> np.ndarray:
    """Mean cosine to the class prototypes minus that to the context; the views are added first.

    Args:
        scales: For each scale, features of the views ``(V, D, h, w)``.
        own: Class prototypes ``(P, D)``.
        context: Context prototypes ``(Q, D)``.
        offset: Added before negative values become 0.
        size: Height and width of the picture.
    """
    rectified = []
    for views in scales:
        added = np.zeros(views.shape[1:])
        for view in views:
            added += view
        signed = local_prototype_map(added[None], [own], [context])[0, 0] + offset
        rectified.append(np.where(signed > 0, signed, 0.0))
    return _merged(rectified, size)
