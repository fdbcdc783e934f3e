"""Slow reference for maps over scales and mirrored views: one class of one picture at a time."""

import numpy as np

from tests.oracles.activation import class_activation_map, local_prototype_map, normalize_map
from tests.oracles.interpolation import bilinear, top_left


def _merged(rectified: list[np.ndarray], size: tuple[int, int], eps: float) -> np.ndarray:
    """Sum over scales on the grid of every fourth row and column, divided by its maximum."""
    grid = (len(range(0, size[0], 4)), len(range(0, size[1], 4)))
    total = np.zeros(grid)
    for values in rectified:
        total += bilinear(values, grid)
    return normalize_map(total, eps)


def _rectified_views(scales: list[np.ndarray], weight: np.ndarray) -> list[np.ndarray]:
    """For each scale the sum over views of the rectified class score."""
    rectified = []
    for views in scales:
        values = np.zeros(views.shape[2:])
        for view in views.astype(np.float64):
            values += class_activation_map(view[None], weight[None])[0, 0]
        rectified.append(values)
    return rectified


def plain_map(scales: list[np.ndarray], weight: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class activation map; each view is rectified, then the views are added.

    Args:
        scales: For each scale, features of the views ``(V, D, h, w)``.
        weight: The class's weights ``(D,)``.
        size: Height and width of the picture.
    """
    return _merged(_rectified_views(scales, weight), size, 1e-5)


def sampled_plain_map(
    scales: list[np.ndarray], weight: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The same at full size, then read at the corners of the first scale's grid cells.

    The resized maps have sides that are multiples of 16 and are cut to the picture.
    """
    total = np.zeros(size)
    for values in _rectified_views(scales, weight):
        sides = [16 * ((side + 15) // 16) for side in size]
        total += bilinear(values, (sides[0], sides[1]))[: size[0], : size[1]]
    grid = scales[0].shape[2:]
    return top_left(normalize_map(total, 1e-5), (grid[0], grid[1]))


def prototype_map(
    scales: list[np.ndarray],
    own: np.ndarray,
    context: np.ndarray,
    offset: float,
    size: tuple[int, int],
    eps: float = 1e-5,
) -> np.ndarray:
    """Mean cosine to the class prototypes minus that to the context; the views are added first.

    Args:
        scales: For each scale, features of the views ``(V, D, h, w)``.
        own: Class prototypes ``(P, D)``.
        context: Context prototypes ``(Q, D)``.
        offset: Added before negative values become 0.
        size: Height and width of the picture.
        eps: Added to the maximum that the sum is divided by.
    """
    rectified = []
    for views in scales:
        added = np.zeros(views.shape[1:])
        for view in views:
            added += view
        signed = local_prototype_map(added[None], [own], [context])[0, 0] + offset
        rectified.append(np.where(signed > 0, signed, 0.0))
    return _merged(rectified, size, eps)
