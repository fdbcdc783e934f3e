"""Slow reference for resampling a grid."""

import numpy as np


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ``(h, w)`` with pixel centres at half integers and the border repeated."""
    height, width = values.shape
    result = np.zeros(size)
    for row, column in np.ndindex(size):
        y = min(max((row + 0.5) * height / size[0] - 0.5, 0.0), height - 1.0)
        x = min(max((column + 0.5) * width / size[1] - 0.5, 0.0), width - 1.0)
        top, left = int(y), int(x)
        for dy in (0, 1):
            for dx in (0, 1):
                share = abs(1 - dy - (y - top)) * abs(1 - dx - (x - left))
                result[row, column] += (
                    share * values[min(top + dy, height - 1), min(left + dx, width - 1)]
                )
    return result


def top_left(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sample ``(h, w)`` at the truncated positions ``i * h / rows``, as old resizing did."""
    result = np.zeros(size, values.dtype)
    for row, column in np.ndindex(size):
        result[row, column] = values[
            row * values.shape[0] // size[0], column * values.shape[1] // size[1]
        ]
    return result
