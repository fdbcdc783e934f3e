"""A random walk that spreads maps over a picture without crossing boundaries.

Pairs of grid cells closer than a radius have an affinity; all others have none. A step replaces
every cell by the mean of itself and its neighbours, weighted by affinity to a power. In IRN (Ahn et
al., "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
Eq. 4 and 5) the affinity of a pair is 1 minus the strongest boundary on the way from one cell to
the other; in PSA (Ahn and Kwak, CVPR 2018) it is learnt directly.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import dia_array
from torch import Tensor

from lpcam.errors import InputError

Offset = tuple[int, int]


def pair_offsets(radius: int) -> list[Offset]:
    """Steps (rows, columns) to the neighbours closer than a radius, one of each opposite pair."""
    return [
        (rows, columns)
        for rows in range(radius)
        for columns in range(1 - radius, radius)
        if (rows, columns) > (0, 0) and rows**2 + columns**2 < radius**2
    ]


def path_cells(offset: Offset) -> list[Offset]:
    """Cells on the way from (0, 0) to an offset, both ends included.

    Those of the bounding box whose squared distance to the line is below 1.
    """
    rows, columns = offset
    return [
        (y, x)
        for y in range(rows + 1)
        for x in range(min(columns, 0), max(columns, 0) + 1)
        if (rows * x - columns * y) ** 2 < rows**2 + columns**2
    ]


def at_offset(grid: Tensor, offset: Offset, radius: int) -> Tensor:
    """The cells at an offset from every cell that has all its neighbours in the grid.

    Those sources leave out ``radius - 1`` rows at the bottom and columns on both sides.

    Args:
        grid: Any values ``(..., h, w)``.
        offset: One of :func:`pair_offsets`, or (0, 0) for the sources themselves.
        radius: The radius.

    Returns:
        A view ``(..., h - radius + 1, w - 2 * radius + 2)``.
    """
    rows, columns = offset
    margin = radius - 1
    height, width = grid.shape[-2] - margin, grid.shape[-1] - 2 * margin
    return grid[..., rows : rows + height, margin + columns : margin + columns + width]


def edge_affinity(edge: Tensor, radius: int) -> Tensor:
    """Affinity of every pair: 1 minus the maximum of the boundary map on the way.

    Args:
        edge: Boundary probability ``(..., h, w)``.
        radius: The radius.

    Returns:
        ``(..., O, h', w')`` for the O offsets of :func:`pair_offsets` and the sources of
        :func:`at_offset`.
    """
    strongest = [
        torch.stack([at_offset(edge, cell, radius) for cell in path_cells(offset)]).amax(0)
        for offset in pair_offsets(radius)
    ]
    return 1 - torch.stack(strongest, -3)


def chebyshev_coefficients(power: int) -> list[float]:
    """Coefficients of the Chebyshev polynomials T_0, T_1, ... in ``x ** power`` for x in -1..1.

    They are positive and sum to 1; the last ones are left out as long as two of them sum to less
    than 1e-15.
    """
    terms = [
        (2 if order else 1) * math.comb(power, (power - order) // 2) / 2**power
        if (power - order) % 2 == 0
        else 0.0
        for order in range(power + 1)
    ]
    while sum(terms[-2:]) < 1e-15:
        del terms[-1]
    return terms


def propagate(maps: Tensor, affinity: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """Walk with the affinities to a power, each cell's divided by their sum. Without gradient.

    The matrix of a step is sparse, and its entries lie on few diagonals: one for each offset and
    its opposite. A product with it is faster by diagonals than by rows, and runs on one core, so it
    does not stall when other processes use the rest. On a GPU starting that many short operations
    would take as long, so tensors that are there are brought here and back.

    A step's matrix has real eigenvalues in -1..1, so its power is a sum of Chebyshev polynomials of
    it whose weights vanish quickly: 256 steps take half as many products, the rest is rounding.

    Args:
        maps: Maps ``(K, h, w)``; there may be none.
        affinity: Affinity ``(O, h, w)`` of each cell to the one at an offset of
            :func:`pair_offsets`, and as much the other way. Pairs that leave the grid do not
            count. A cell's affinity to itself is 1.
        radius: The radius.
        beta: Power of the affinities.
        steps: Steps.

    Returns:
        Maps ``(K, h, w)``, as float64 if the given ones are and float32 otherwise.
    """
    height, width = maps.shape[1:]
    # Rows lie one after another with a gap as wide as the longest step between them, so that no
    # step leads from one row's end to the next row's start.
    gap = radius - 1
    length = height * (width + gap)
    # In single precision the rounding errors of so many steps add up to more than 1e-4.
    weights = affinity.detach().to("cpu", torch.float64).pow(beta)
    diagonals = {0: torch.ones(length, dtype=torch.float64)}
    for (rows, columns), weight in zip(pair_offsets(radius), weights, strict=True):
        if rows < height and abs(columns) < width:
            inside = slice(height - rows), slice(max(-columns, 0), width - max(columns, 0))
            laid_out = weights.new_zeros(height, width + gap)
            laid_out[inside] = weight[inside]
            shift = rows * (width + gap) + columns
            diagonals[-shift] = laid_out.flatten()
            diagonals[shift] = laid_out.flatten().roll(shift)
    values = torch.stack(list(diagonals.values())).numpy()
    matrix = dia_array((values, list(diagonals)), shape=(length, length))
    total = matrix @ np.ones(length)
    coefficients = chebyshev_coefficients(steps)
    walked = F.pad(maps.detach().to("cpu", torch.float64), (0, gap)).flatten(1).numpy()
    for row in walked:
        previous, current = row.copy(), (matrix @ row) / total
        row *= coefficients[0]
        for coefficient in coefficients[1:]:
            row += coefficient * current
            previous, current = current, 2 / total * (matrix @ current) - previous
    result = torch.from_numpy(walked).unflatten(1, (height, width + gap))[..., :width]
    return result.to(maps.device, torch.promote_types(maps.dtype, torch.float32))


def random_walk(
    maps: Tensor, edge: Tensor, *, radius: int = 5, beta: float = 10, steps: int = 256
) -> Tensor:
    """Spread maps up to the boundaries of a picture (IRN, Eq. 5 and 6).

    The walk starts at ``maps * (1 - edge)``.

    Args:
        maps: Maps ``(K, h, w)``; there may be none, and a map of zeros stays one.
        edge: Boundary probability ``(h, w)`` in 0..1. Beyond the border it counts as 1.
        radius: Cells, at least 2; only pairs closer than this exchange anything.
        beta: Power of the affinities. The higher, the harder it is to pass a weak boundary.
        steps: Steps.

    Returns:
        Maps ``(K, h, w)``, as float64 if the given ones are and float32 otherwise.

    Raises:
        InputError: The two are not on the same grid, or the radius leaves no pair.
    """
    if radius < 2:
        raise InputError(f"radius={radius}: leaves no pair of cells; give 2 or more")
    if maps.ndim != 3 or maps.shape[1:] != edge.shape:
        raise InputError(
            f"maps of shape {tuple(maps.shape)} and edge of shape {tuple(edge.shape)}; "
            "give (K, h, w) and (h, w)"
        )
    edge = edge.to(torch.promote_types(maps.dtype, torch.float32))
    margin = radius - 1
    affinity = edge_affinity(F.pad(edge, (margin, margin, 0, margin), value=1.0), radius)
    return propagate(maps * (1 - edge), affinity, radius=radius, beta=beta, steps=steps)
