"""Slow reference for following displacements: cell by cell, step by step."""

import numpy as np


def between(field: np.ndarray, row: float, column: float) -> np.ndarray:
    """A field ``(2, h, w)`` at a place between cells: their mean, the nearer the more."""
    height, width = field.shape[1:]
    value = np.zeros(2)
    for r in range(height):
        for c in range(width):
            value += max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c)) * field[:, r, c]
    return value


def follow(field: np.ndarray, steps: int) -> np.ndarray:
    """Where each cell is after so many steps; none leaves the grid."""
    height, width = field.shape[1:]
    places = np.zeros((2, height, width))
    for r in range(height):
        for c in range(width):
            row, column = float(r), float(c)
            for _ in range(steps):
                down, right = between(field, row, column)
                row = min(max(row + down, 0), height - 1)
                column = min(max(column + right, 0), width - 1)
            places[:, r, c] = row, column
    return places
