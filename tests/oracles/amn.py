"""Slow reference for AMN: one pixel, one channel, one tap at a time."""

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    """Of a vector."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def loss(logits: np.ndarray, labels: np.ndarray, eps: float) -> float:
    """Half the mean over background pixels and half that over the others; 255 counts nowhere."""
    sides: list[list[float]] = [[], []]
    count = logits.shape[1]
    for b, y, x in np.ndindex(labels.shape):
        label = labels[b, y, x]
        if label == 255:
            continue
        target = [1 - eps if c == label else eps / (count - 1) for c in range(count)]
        shares = softmax(logits[b, :, y, x])
        entropy = -sum(t * np.log(s) for t, s in zip(target, shares, strict=True))
        sides[int(label > 0)].append(entropy)
    return sum(0.5 * sum(side) / len(side) for side in sides if side)


def responses(
    features: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray], rates: list[int]
) -> np.ndarray:
    """Sum of dilated 3x3 convolutions of ``(D, h, w)`` with zeros around: ``(n, h, w)``."""
    _, height, width = features.shape
    result = np.zeros((len(biases[0]), height, width))
    for weight, bias, rate in zip(weights, biases, rates, strict=True):
        for n, y, x in np.ndindex(result.shape):
            result[n, y, x] += bias[n]
            for i, j in np.ndindex(3, 3):
                row, column = y + (i - 1) * rate, x + (j - 1) * rate
                if 0 <= row < height and 0 <= column < width:
                    result[n, y, x] += (weight[n, :, i, j] * features[:, row, column]).sum()
    return result


def stretch(values: np.ndarray, inside: np.ndarray, eps: float) -> np.ndarray:
    """Minimum to 0 and maximum to 1 of a map inside; outside as it was."""
    chosen = [values[place] for place in np.ndindex(values.shape) if inside[place]]
    result = values.copy()
    for place in np.ndindex(values.shape):
        if inside[place]:
            result[place] = (values[place] - min(chosen)) / (max(chosen) - min(chosen) + eps)
    return result
