# python experiments/benchmark_random_walk.py   writes experiments/benchmark_random_walk.md
"""How long the random walk takes beside the published way, which squares a dense matrix.

The dense matrix is built from the same affinities, cell by cell, outside the clock. It is squared
on the smaller grid only: on the larger one it would take minutes.
"""

import platform
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lpcam.refiners import random_walk
from lpcam.refiners.random_walk import edge_affinity, pair_offsets

ROUNDS, CLASSES, RADIUS, BETA, SQUARINGS = 7, 2, 5, 10, 8
GRIDS = ((94, 125), (47, 63))


def transition(edge: torch.Tensor) -> torch.Tensor:
    """The dense matrix of one step ``(h*w, h*w)``, its columns summing to 1."""
    height, width = edge.shape
    margin = RADIUS - 1
    affinity = edge_affinity(F.pad(edge, (margin, margin, 0, margin), value=1.0), RADIUS)
    cells = torch.arange(edge.numel()).reshape(height, width)
    matrix = torch.eye(edge.numel())
    for (rows, columns), value in zip(pair_offsets(RADIUS), affinity, strict=True):
        inside = slice(height - rows), slice(max(-columns, 0), min(width - columns, width))
        start = cells[inside].flatten()
        end = start + rows * width + columns
        matrix[start, end] = matrix[end, start] = value[inside].flatten() ** BETA
    return matrix / matrix.sum(0)


def peak() -> float:
    """The most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, print and write the table."""
    torch.manual_seed(0)
    random_walk(torch.rand(CLASSES, 8, 8), torch.rand(8, 8))
    walked = {}
    for grid in GRIDS:
        maps, edge = torch.rand(CLASSES, *grid), torch.rand(grid) ** 4
        before, times = peak(), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            result = random_walk(maps, edge, radius=RADIUS, beta=BETA, steps=2**SQUARINGS)
            times.append(time.perf_counter() - start)
        walked[grid] = (sorted(times)[ROUNDS // 2], peak() - before)
    before = peak()
    matrix = transition(edge)
    start = time.perf_counter()
    for _ in range(SQUARINGS):
        matrix = matrix @ matrix
    dense = (maps * (1 - edge)).flatten(1) @ matrix
    seconds, memory = time.perf_counter() - start, peak() - before
    difference = float((dense - result.flatten(1)).abs().max() / result.abs().max())
    rows = [
        "`python experiments/benchmark_random_walk.py`",
        "",
        f"{CLASSES} classes, radius {RADIUS}, {2**SQUARINGS} steps; median of {ROUNDS} rounds, the "
        f"dense way once. {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}.",
        "",
        "| | grid | seconds | further memory |",
        "|---|---|---|---|",
        *(
            f"| step by step | {h} x {w} | {walked[h, w][0]:.3f} | {walked[h, w][1]:.0f} MB |"
            for h, w in GRIDS
        ),
        f"| dense, squared | {GRIDS[-1][0]} x {GRIDS[-1][1]} | {seconds:.1f} | {memory:.0f} MB |",
        "",
        f"On the smaller grid the dense way takes {seconds / walked[GRIDS[-1]][0]:.0f} times as "
        f"long; the results differ by {difference:.0e} of the maximum.",
    ]
    print("\n".join(rows))
    Path(__file__).with_suffix(".md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
