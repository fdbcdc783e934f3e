"""Scores at 100 thresholds: one histogram beside an evaluation for each threshold."""

import numpy as np
import torch

from experiments.benchmarks.harness import (
    Method,
    Options,
    Row,
    add_memory,
    ratio,
    rounds,
    section,
    target,
    timed_rows,
)
from lpcam.evaluation import SegmentationScore

CLASSES, THRESHOLDS = 20, 100
HISTOGRAM, AGAIN = "one histogram", "each threshold anew"


def evaluations(options: Options) -> dict[str, Method]:
    """Ways to get the confusion matrices ``(100, 21, 21)`` of a few pictures of two classes."""
    rng = np.random.default_rng(0)
    height, width = (38, 50) if options.quick else (375, 500)
    pictures = []
    for _ in range(2):
        keys = np.sort(rng.choice(CLASSES, 2, replace=False))
        truth = rng.choice([0, *(keys + 1), 255], (height, width), p=[0.6, 0.2, 0.15, 0.05])
        maps = torch.from_numpy(rng.random((2, height, width), np.float32))
        pictures.append((maps, keys, truth.astype(np.uint8)))

    def histogram() -> np.ndarray:
        score = SegmentationScore(CLASSES, THRESHOLDS - 1)
        for picture in pictures:
            score.update(*picture)
        return score.compute().confusion

    def again() -> np.ndarray:
        labels = CLASSES + 1
        confusion = np.zeros((THRESHOLDS, labels, labels), np.int64)
        for maps, keys, truth in pictures:
            values = np.pad(keys + 1, (1, 0))
            known = truth < 255
            for place in range(THRESHOLDS):
                background = np.full((1, height, width), place / (THRESHOLDS - 1), np.float32)
                found = values[np.concatenate([background, maps.numpy()]).argmax(0)]
                pairs = truth[known].astype(np.int64) * labels + found[known]
                counts = np.bincount(pairs, minlength=labels**2)
                confusion[place] += counts.reshape(labels, labels)
        return confusion

    return {HISTOGRAM: histogram, AGAIN: again}


def table(options: Options) -> list[Row]:
    """Both ways, whose confusion matrices are the same."""
    methods = evaluations(options)
    same = np.array_equal(methods[HISTOGRAM](), methods[AGAIN]())  # type: ignore[arg-type]
    assert same, "confusion matrices differ"
    seconds = rounds(methods, 9, warm_up=1, budget=10)
    rows = timed_rows(seconds)
    add_memory(rows, "thresholds:evaluations", options)
    times = ratio(seconds[AGAIN], seconds[HISTOGRAM])
    return [
        section(
            f"{THRESHOLDS} thresholds",
            "Two pictures of 375x500 pixels with two classes each; the confusion matrices of both "
            "ways are the same.",
            rows,
            targets=[target("each threshold anew / one histogram", times, least=25)],
            control=seconds[AGAIN],
        )
    ]
