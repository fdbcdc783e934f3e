"""Slow reference for the equations of activation maps: one position, one prototype at a time."""

import numpy as np


def class_activation_map(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ReLU of the class score of every single feature: ``(B, D, h, w)`` -> ``(B, C, h, w)``."""
    pictures, _, height, width = features.shape
    maps = np.zeros((pictures, len(weight), height, width))
    for b, c, y, x in np.ndindex(maps.shape):
        score = float(np.dot(weight[c].astype(np.float64), features[b, :, y, x]))
        maps[b, c, y, x] = max(score, 0.0)
    return maps


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine similarity, 0 when a vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / norms) if norms > 0 else 0.0


def local_prototype_map(
    features: np.ndarray,
    class_prototypes: list[np.ndarray],
    context_prototypes: list[np.ndarray],
) -> np.ndarray:
    """Mean cosine to the class prototypes minus mean cosine to the context prototypes."""
    pictures, _, height, width = features.shape
    maps = np.zeros((pictures, len(class_prototypes), height, width))
    for b, c, y, x in np.ndindex(maps.shape):
        feature = features[b, :, y, x]
        for sign, prototypes in ((1, class_prototypes[c]), (-1, context_prototypes[c])):
            similarities = [cosine(feature, prototype) for prototype in prototypes]
            if similarities:
                maps[b, c, y, x] += sign * sum(similarities) / len(similarities)
    return maps


def normalize_map(values: np.ndarray, eps: float) -> np.ndarray:
    """One map ``(h, w)``: negative values to 0, then divided by the maximum plus eps."""
    positive = np.where(values > 0, values, 0.0).astype(np.float64)
    return positive / (positive.max() + eps)
