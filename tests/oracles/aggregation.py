"""Slow reference for maps from several prototypes: one position, one prototype at a time."""

import math

import numpy as np

from tests.oracles.activation import cosine


def aggregate(similarities: list[float], how: str) -> float:
    """One number from the similarities to several prototypes; 0 without any."""
    if not similarities:
        return 0.0
    if how == "max":
        return max(similarities)
    if how == "topk":
        largest = sorted(similarities)[-3:]
        return sum(largest) / len(largest)
    if how == "lse":
        powers = [math.exp(10 * similarity) for similarity in similarities]
        return math.log(sum(powers) / len(powers)) / 10
    return sum(similarities) / len(similarities)


def aggregated_map(
    features: np.ndarray, own: list[np.ndarray], context: list[np.ndarray], how: str
) -> np.ndarray:
    """Maps ``(B, C, h, w)`` after ReLU; a class without own prototypes has none."""
    pictures, _, height, width = features.shape
    maps = np.zeros((pictures, len(own), height, width))
    for b, c, y, x in np.ndindex(maps.shape):
        if len(own[c]):
            feature = features[b, :, y, x]
            to_own, to_context = (
                aggregate([cosine(feature, prototype) for prototype in group[c]], how)
                for group in (own, context)
            )
            maps[b, c, y, x] = max(to_own - to_context, 0.0)
    return maps
