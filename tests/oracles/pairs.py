"""Slow reference for pairs of cells, their labels, and the losses: one pair at a time."""

from collections.abc import Iterator

import numpy as np

from tests.oracles.random_walk import near_offsets

Pair = tuple[int, int, int, int, int]


def pairs(shape: tuple[int, int, int], radius: int) -> Iterator[Pair]:
    """(picture, row, column, rows down, columns right) of every pair that is trained on.

    The first cell of a pair has to have all its neighbours in the grid.
    """
    pictures, height, width = shape
    offsets = near_offsets(radius)
    for b in range(pictures):
        for y in range(height):
            for x in range(width):
                reach = range(-radius + 1, radius)
                if y + radius - 1 < height and all(0 <= x + dx < width for dx in reach):
                    for dy, dx in offsets:
                        yield b, y, x, dy, dx


def kind(labels: np.ndarray, pair: Pair) -> str | None:
    """What is known of a pair: background, foreground, different, or nothing."""
    b, y, x, dy, dx = pair
    first, second = labels[b, y, x], labels[b, y + dy, x + dx]
    if first == 255 or second == 255:
        return None
    if first != second:
        return "different"
    return "background" if first == 0 else "foreground"


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def affinity_loss(affinity: dict[Pair, float], labels: np.ndarray, eps: float = 1e-5) -> float:
    """A quarter for equal pairs of background, one for those of a class, half for different."""
    terms: dict[str, list[float]] = {"background": [], "foreground": [], "different": []}
    for pair, value in affinity.items():
        known = kind(labels, pair)
        if known is not None:
            right = 1 - value if known == "different" else value
            terms[known].append(-float(np.log(right + eps)))
    return (
        mean(terms["background"]) / 4 + mean(terms["foreground"]) / 4 + mean(terms["different"]) / 2
    )


def displacement_loss(displacement: np.ndarray, labels: np.ndarray, radius: int) -> float:
    """Mean absolute error of differences of displacements ``(B, 2, h, w)``, over both channels."""
    terms: dict[str, list[float]] = {"background": [], "foreground": []}
    for pair in pairs((len(labels), *labels.shape[1:]), radius):
        known = kind(labels, pair)
        b, y, x, dy, dx = pair
        difference = displacement[b, :, y, x] - displacement[b, :, y + dy, x + dx]
        if known == "foreground":
            difference = difference - np.array([dy, dx])
        if known in terms:
            terms[known].append(float(np.abs(difference).sum() / 2))
    return mean(terms["background"]) + mean(terms["foreground"])
