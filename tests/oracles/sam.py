"""Slow reference for merging masks, with sets of pixels."""

import numpy as np


def merge(
    labels: np.ndarray, masks: np.ndarray, mask_share: float, class_share: float
) -> np.ndarray:
    """Labels after merging; a later class overwrites an earlier one."""

    def pixels(where: np.ndarray) -> set[tuple[int, int]]:
        return {(int(y), int(x)) for y, x in zip(*np.nonzero(where), strict=True)}

    left = [pixels(mask) for mask in masks]
    covered = set().union(*left)
    result = np.zeros_like(labels)
    for label in sorted(set(labels[labels > 0].tolist())):
        region = pixels(labels == label)
        chosen = []
        for mask in left:
            inside = len(mask & region)
            if mask and (inside / len(mask) > mask_share or inside / len(region) >= class_share):
                chosen.append(mask)
        left = [mask for mask in left if not any(mask is one for one in chosen)]
        for y, x in set().union(*chosen):
            result[y, x] = label
        for y, x in region - covered:
            result[y, x] = label
    return result
