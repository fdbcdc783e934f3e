"""Slow reference for k-means with cosine assignment and plain means."""

import numpy as np

from tests.oracles.activation import cosine


def assign(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The centre of largest cosine for each row, the first of equals; -1 for a zero row."""
    labels = np.full(len(rows), -1)
    for i, row in enumerate(rows):
        if np.any(row != 0):
            labels[i] = int(np.argmax([cosine(row, centre) for centre in centres]))
    return labels


def cosine_kmeans(
    rows: np.ndarray, init: np.ndarray, tol: float, max_iter: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Centres, labels and the number of iterations; data that empties a cluster is refused."""
    centres = init.astype(np.float64)
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        labels = assign(rows, centres)
        movement = 0.0
        moved = np.zeros_like(centres)
        for k in range(len(centres)):
            members = [row for row, label in zip(rows, labels, strict=True) if label == k]
            if not members:
                raise AssertionError("an empty cluster: choose other data")
            moved[k] = np.sum(np.array(members, np.float64), 0) / len(members)
            movement += np.sqrt(((moved[k] - centres[k]) ** 2).sum())
        centres = moved
        if movement**2 < tol:
            break
    return centres, labels, iterations


def objective(rows: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> float:
    """Sum over the rows of their norm times the cosine to their centre."""
    return sum(
        float(np.sqrt((row.astype(np.float64) ** 2).sum())) * cosine(row, centres[label])
        for row, label in zip(rows, labels, strict=True)
        if label >= 0
    )
