"""Slow reference for the saliency rule, a pixel at a time."""

import numpy as np


def labels(
    scores: np.ndarray, saliency: np.ndarray, theta: float, alpha: float, beta: float
) -> np.ndarray:
    """Label of each pixel: 0 background, place among the classes + 1."""
    result = np.zeros(saliency.shape, int)
    for y, x in np.ndindex(saliency.shape):
        best, chosen = (1.0 if saliency[y, x] <= 100 * theta else 0.0), 0
        for place, score in enumerate(scores[:, y, x], 1):
            value = -2.0 if score < alpha else 2.0 if score > beta else float(score)
            if value > best:
                best, chosen = value, place
        result[y, x] = chosen
    return result
