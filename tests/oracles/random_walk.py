"""Slow reference for the random walk: pair by pair, then a dense matrix to a power."""

import numpy as np


def near_offsets(radius: int) -> set[tuple[int, int]]:
    """All steps (rows, columns) shorter than the radius that go down, or right in the same row."""
    found = set()
    for rows in range(-radius, radius + 1):
        for columns in range(-radius, radius + 1):
            goes_on = rows > 0 or (rows == 0 and columns > 0)
            if goes_on and np.hypot(rows, columns) < radius:
                found.add((rows, columns))
    return found


def cells_between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells of the box spanned by two cells that lie less than 1 from the line through them."""
    direction = np.subtract(end, start) / np.hypot(*np.subtract(end, start))
    cells = []
    for y in range(min(start[0], end[0]), max(start[0], end[0]) + 1):
        for x in range(min(start[1], end[1]), max(start[1], end[1]) + 1):
            along = np.subtract((y, x), start)
            distance = abs(direction[0] * along[1] - direction[1] * along[0])
            if distance < 1 - 1e-9:
                cells.append((y, x))
    return cells


def affinity_matrix(edge: np.ndarray, radius: int) -> np.ndarray:
    """Affinity of every two cells ``(h*w, h*w)``: symmetric, 1 to itself, 0 beyond the radius."""
    width = edge.shape[1]
    matrix = np.eye(edge.size)
    for first in range(edge.size):
        for second in range(edge.size):
            start, end = divmod(first, width), divmod(second, width)
            distance = np.hypot(start[0] - end[0], start[1] - end[1])
            if first != second and distance < radius:
                strongest = max(edge[cell] for cell in cells_between(start, end))
                matrix[first, second] = 1 - strongest
    return matrix


def walk(maps: np.ndarray, matrix: np.ndarray, beta: float, steps: int) -> np.ndarray:
    """Multiply flattened maps with the transition matrix to a power."""
    powered = np.where(matrix > 0, matrix, 0.0) ** beta
    transition = powered / powered.sum(0, keepdims=True)
    flat = maps.reshape(len(maps), -1) @ np.linalg.matrix_power(transition, steps)
    return flat.reshape(maps.shape)


def random_walk(
    maps: np.ndarray, edge: np.ndarray, radius: int = 5, beta: float = 10, steps: int = 256
) -> np.ndarray:
    """The whole of it, from ``maps * (1 - edge)``."""
    return walk(maps * (1 - edge), affinity_matrix(edge, radius), beta, steps)
