"""Slow reference for ReCAM: one class, one position at a time."""

import numpy as np


def class_feature(features: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Mean over positions of CAM / (max + eps) times the feature there: ``(D,)``."""
    _, height, width = features.shape
    cam = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        cam[y, x] = max(float((weight * features[:, y, x]).sum()), 0.0)
    peak = cam.max() + eps
    total = np.zeros(len(features))
    for y, x in np.ndindex(height, width):
        total += cam[y, x] / peak * features[:, y, x]
    return total / (height * width)


def loss(
    grids: list[np.ndarray],
    labels: np.ndarray,
    weight: np.ndarray,
    sce_weight: np.ndarray,
    eps: float = 1e-5,
) -> float:
    """Softmax cross-entropy of each present class's feature; mean over classes, then pictures."""
    pictures = []
    for features, shown in zip(grids, labels, strict=True):
        classes = []
        for c in np.flatnonzero(shown):
            found = class_feature(features, weight[c], eps)
            scores = [float((row * found).sum()) for row in sce_weight]
            shares = np.exp(scores) / np.exp(scores).sum()
            classes.append(-np.log(shares[c]))
        if classes:
            pictures.append(sum(classes) / len(classes))
    return sum(pictures) / len(pictures)
