"""Slow reference for a step between a picture's own positions, a pair of positions at a time."""

import math

import numpy as np


def unit(vector: np.ndarray) -> np.ndarray:
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return vector / length if length > 0 else vector


def own_prototypes(values: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Of one map ``(h, w)`` and features ``(D, h, w)``."""
    dim, height, width = features.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    inside, outside = np.zeros(dim), np.zeros(dim)
    for y, x in places:
        inside += values[y, x] * unit(features[:, y, x])
        outside += (1 - values[y, x]) * unit(features[:, y, x])
    inside, outside = unit(inside), unit(outside)
    found = np.zeros((height, width))
    for y, x in places:
        direction = unit(features[:, y, x])
        found[y, x] = max(float(direction @ inside - direction @ outside), 0.0)
    return found / (found.max() + 1e-5)


def step(
    values: np.ndarray,
    features: np.ndarray,
    stage: np.ndarray,
    sharpness: float,
    stage_weight: float,
) -> np.ndarray:
    """Of one map ``(h, w)``; map, features and stage all on one grid."""
    _, height, width = features.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    found = np.zeros((height, width))
    for y, x in places:
        weights = []
        for v, u in places:
            last = unit(features[:, y, x]) @ unit(features[:, v, u])
            early = unit(stage[:, y, x]) @ unit(stage[:, v, u])
            weights.append(math.exp(sharpness * (last + stage_weight * early)))
        found[y, x] = sum(w * values[p] for w, p in zip(weights, places, strict=True))
        found[y, x] /= sum(weights)
    return found
