"""Slow reference for pixel-adaptive refinement, a pixel and a neighbour at a time."""

import math

import numpy as np


def refine(
    image: np.ndarray,
    maps: np.ndarray,
    dilations: tuple[int, ...],
    iterations: int,
    contrast: float,
    position_weight: float,
) -> np.ndarray:
    """Refine ``(L, H, W)`` by the colours ``(3, H, W)``; float64 throughout."""
    _, height, width = image.shape
    offsets = [
        (d * dy, d * dx)
        for d in dilations
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
        if (dy, dx) != (0, 0)
    ]

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value - max(values)) for value in values]
        return [power / sum(powers) for power in powers]

    distances = [math.hypot(dy, dx) for dy, dx in offsets]
    spread = np.std(distances, ddof=1) + 1e-8
    by_distance = softmax([-((d / spread / contrast) ** 2) for d in distances])
    for _ in range(iterations):
        result = np.zeros_like(maps)
        for y in range(height):
            for x in range(width):
                places = [
                    (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
                    for dy, dx in offsets
                ]
                colours = np.array([image[:, row, column] for row, column in places])
                spreads = colours.std(0, ddof=1) + 1e-8
                terms = (np.abs(colours - image[:, y, x]) / spreads / contrast) ** 2
                by_colour = softmax([-float(row.mean()) for row in terms])
                for n, (row, column) in enumerate(places):
                    weight = (by_colour[n] + position_weight * by_distance[n]) / (
                        1 + position_weight
                    )
                    result[:, y, x] += weight * maps[:, row, column]
        maps = result
    return maps
