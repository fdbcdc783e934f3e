"""Slow reference for what surrounds clustering: the split at tau and the choice by class score."""

import math

import numpy as np


def split(
    features: list[np.ndarray], maps: list[np.ndarray], tau: float
) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(D, h, w)`` above and below tau, picture by picture, row by row.

    Args:
        features: The features of every picture that shows the class.
        maps: Its class activation map ``(h, w)`` in each of them.
        tau: What equals it belongs to neither side.
    """
    foreground, context = [], []
    for picture, activation in zip(features, maps, strict=True):
        for y, x in np.ndindex(activation.shape):
            if activation[y, x] > tau:
                foreground.append(picture[:, y, x])
            elif activation[y, x] < tau:
                context.append(picture[:, y, x])
    return np.array(foreground), np.array(context)


def class_probability(centre: np.ndarray, weight: np.ndarray, class_index: int) -> float:
    """Softmax over the classes' scores of one centre, at one class."""
    scores = [math.fsum(c * w for c, w in zip(centre, row, strict=True)) for row in weight]
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    return exponentials[class_index] / math.fsum(exponentials)
