"""The random walk of IRN: LPCAM's beside the published way, which squares a dense matrix.

The dense matrix is built from the same affinities, cell by cell, outside the clock. It is squared
on the smaller grid only: on the larger one it would take minutes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.harness import (
    Method,
    Options,
    Row,
    add_memory,
    ratio,
    rounds,
    section,
    timed_rows,
)
from lpcam.refiners.random_walk import edge_affinity, pair_offsets, random_walk

CLASSES, RADIUS, BETA, SQUARINGS = 2, 5, 10, 8
# Stride 4 of 375x500 pixels, and half of it.
LARGE, SMALL = (94, 125), (47, 63)


def transition(edge: Tensor) -> Tensor:
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


def walks(options: Options) -> dict[str, Method]:
    """Ways to walk: sparse on both grids, dense on the smaller one."""
    torch.manual_seed(0)
    maps, edges = {}, {}
    for grid in (LARGE, SMALL):
        shape = (grid[0] // 4, grid[1] // 4) if options.quick else grid
        maps[grid], edges[grid] = torch.rand(CLASSES, *shape), torch.rand(shape) ** 4
    step = transition(edges[SMALL])

    def sparse(grid: tuple[int, int]) -> Tensor:
        return random_walk(maps[grid], edges[grid], radius=RADIUS, beta=BETA, steps=2**SQUARINGS)

    def dense() -> Tensor:
        matrix = step
        for _ in range(SQUARINGS):
            matrix = matrix @ matrix
        walked = (maps[SMALL] * (1 - edges[SMALL])).flatten(1) @ matrix
        return walked.unflatten(1, edges[SMALL].shape)

    return {
        _name(SMALL): lambda: sparse(SMALL),
        _name(LARGE): lambda: sparse(LARGE),
        f"dense, squared, {SMALL[0]} x {SMALL[1]}": dense,
    }


def _name(grid: tuple[int, int]) -> str:
    return f"step by step, {grid[0]} x {grid[1]}"


def table(options: Options) -> list[Row]:
    """Both ways on a grid of 47 x 63, and LPCAM's on twice that."""
    methods = walks(options)
    *_, dense = methods
    ours, theirs = methods[_name(SMALL)](), methods[dense]()
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < 1e-3, f"walks differ by {difference:.1e} of the maximum"
    seconds = rounds(methods, 7, warm_up=1, budget=15)
    rows = timed_rows(seconds)
    add_memory(rows, "random_walk:walks", options)
    times = ratio(seconds[dense], seconds[_name(SMALL)])
    text = (
        f"{CLASSES} maps, radius {RADIUS}, {2**SQUARINGS} steps; the dense matrix is there before. "
        f"On the smaller grid its way takes {times:.0f} times as long; results differ by "
        f"{difference:.0e} of the maximum."
    )
    return [section("Random walk", text, rows, control=seconds[_name(LARGE)])]
