"""Slow references for a segmentation network's head, loss and recipe, from the formulas."""

import math

import numpy as np


def sum_head(
    features: np.ndarray, branches: list[tuple[int, np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Sum of 3x3 convolutions with holes, zero outside: ``(D, h, w)`` to ``(outputs, h, w)``.

    A branch is its dilation, its weights ``(outputs, D, 3, 3)`` and its biases ``(outputs,)``.
    """
    _, height, width = features.shape
    outputs = len(branches[0][2])
    result = np.zeros((outputs, height, width))
    for rate, weights, biases in branches:
        for o, y, x in np.ndindex(result.shape):
            result[o, y, x] += biases[o]
            for i, j in np.ndindex(3, 3):
                row, column = y + (i - 1) * rate, x + (j - 1) * rate
                if 0 <= row < height and 0 <= column < width:
                    result[o, y, x] += weights[o, :, i, j] @ features[:, row, column]
    return result


def cross_entropy(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, balanced: bool
) -> float:
    """Weighted mean of ``-log softmax``; of pixels of 255 nothing is known.

    Args:
        scores: ``(B, C + 1, H, W)``.
        labels: ``(B, H, W)``.
        weights: ``(B, H, W)``.
        balanced: Mean of the mean over background and that over the rest.
    """
    sums: dict[bool, list[float]] = {}
    for b, y, x in np.ndindex(labels.shape):
        label = int(labels[b, y, x])
        if label == 255:
            continue
        row = scores[b, :, y, x].astype(float)
        loss = math.log(sum(math.exp(v - row.max()) for v in row)) + row.max() - row[label]
        total = sums.setdefault(balanced and label > 0, [0.0, 0.0])
        total[0] += weights[b, y, x] * loss
        total[1] += weights[b, y, x]
    means = [loss / weight for loss, weight in sums.values() if weight > 0]
    return sum(means) / len(means) if means else 0.0


def published_rates(steps: int, power: float, every: int) -> list[float]:
    """The factor on DeepLabV2's learning rates at each step: a new one each so many steps."""
    factors = []
    for step in range(steps):
        if step % every == 0:
            factor = (1 - step / steps) ** power
        factors.append(factor)
    return factors
