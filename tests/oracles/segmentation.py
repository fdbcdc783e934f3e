"""Slow reference for masks and their scores: one pixel, one threshold, one class at a time."""

import math

import numpy as np


def seed_mask(maps: np.ndarray, classes: list[int], threshold: float) -> np.ndarray:
    """Class index + 1 of the strongest map where it exceeds the threshold in float32, else 0."""
    mask = np.zeros(maps.shape[1:], np.int64)
    for y, x in np.ndindex(mask.shape):
        highest = np.float32(threshold)
        for class_index, values in zip(classes, maps, strict=True):
            if np.float32(values[y, x]) > highest:
                highest = np.float32(values[y, x])
                mask[y, x] = class_index + 1
    return mask


def confusion(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixel counts ``(C + 1, C + 1)``, true label first; 255 in the truth is not counted."""
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for true, predicted in zip(truth.flat, prediction.flat, strict=True):
        if true != 255:
            counts[int(true), int(predicted)] += 1
    return counts


def scores(counts: np.ndarray) -> dict[str, float]:
    """Scores of one confusion matrix; NaN where there is nothing to average."""
    lists: dict[str, list[float]] = {
        name: [] for name in ("iou", "precision", "recall", "fp", "fn")
    }
    for label in range(len(counts)):
        hit = counts[label, label]
        true, predicted = counts[label, :].sum(), counts[:, label].sum()
        union = true + predicted - hit
        if union:
            lists["iou"].append(hit / union)
        if label == 0:
            continue
        if union:
            lists["fp"].append(1 - true / union)
            lists["fn"].append(1 - predicted / union)
        if predicted:
            lists["precision"].append(hit / predicted)
        if true:
            lists["recall"].append(hit / true)
    means = {name: sum(v) / len(v) if v else math.nan for name, v in lists.items()}
    means["miou"] = means.pop("iou")
    return means
