"""Slow reference for AdvCAM on a network whose features are the picture itself, with one view."""

import numpy as np


def climb(
    picture: np.ndarray,
    weight: np.ndarray,
    chosen: int,
    *,
    steps: int,
    step_size: float,
    regularization: float,
    strong: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the maps of all steps ``(h, w)``, and the picture after the last step.

    The gradient is written out: a rectified score has the class's weights where it is positive.
    """
    _, height, width = picture.shape
    low, high = picture.min(), picture.max()
    x = picture.copy()
    total = np.zeros((height, width))
    start = None
    for _ in range(steps):
        scores = np.einsum("cd,dyx->cyx", weight, x)
        cam = np.maximum(scores[chosen], 0)
        start = cam if start is None else start
        total += cam
        gradient = np.zeros_like(x)
        for row, column in np.ndindex(height, width):
            for k in range(len(weight)):
                if scores[k, row, column] > 0:
                    sign = 1 if k == chosen else -1  # 2 y_c - sum_k y_k
                    gradient[:, row, column] += sign * weight[k] / (height * width)
            if scores[chosen, row, column] > 0 and cam[row, column] > strong * cam.max():
                change = np.sign(cam[row, column] - start[row, column])
                gradient[:, row, column] -= regularization * change * weight[chosen]
        x = np.clip(x + step_size * gradient / np.abs(gradient).max(), low, high)
    return total, x
