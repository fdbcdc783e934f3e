"""Slow reference for the mean field of a dense CRF, a pair of pixels at a time."""

import math

import numpy as np


def mean_field(
    image: np.ndarray,
    probabilities: np.ndarray,
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> np.ndarray:
    """Probabilities ``(L, H, W)``; the kernels are (sxy, weight) and (sxy, srgb, weight)."""
    count, height, width = probabilities.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    kernels = np.zeros((2, len(pixels), len(pixels)))
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            place = (y - v) ** 2 + (x - u) ** 2
            colour = float(((image[y, x].astype(float) - image[v, u]) ** 2).sum())
            kernels[0, i, j] = math.exp(-place / (2 * gaussian[0] ** 2))
            kernels[1, i, j] = math.exp(
                -place / (2 * bilateral[0] ** 2) - colour / (2 * bilateral[1] ** 2)
            )
    for kernel in kernels:
        sums = kernel.sum(1)
        kernel /= np.sqrt(np.outer(sums, sums))
    mixed = gaussian[1] * kernels[0] + bilateral[2] * kernels[1]
    clipped = [[max(plane[y, x], 1e-5) for y, x in pixels] for plane in probabilities]
    unary = -np.log(np.array(clipped))

    def softmax(energies: np.ndarray) -> np.ndarray:
        powers = np.exp(energies.min(0) - energies)
        return powers / powers.sum(0)

    found = softmax(unary)
    for _ in range(iterations):
        found = softmax(unary - found @ mixed.T)
    return found.reshape(count, height, width)
