"""The layers of IRN."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lpcam.functional import resize


class RelationNetwork(nn.Module):
    """Boundaries and displacements from the stages of a backbone.

    Normalisation is by groups of channels in one picture, so a picture's result does not depend on
    its batch.

    Args:
        channels: Channels of each stage, the finest first; at least three.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.edge_branches = nn.ModuleList(_branch(size, 32, 4) for size in channels)
        self.edge_out = nn.Conv2d(32 * len(channels), 1, 1)
        shallow, deep = channels[:2], channels[2:]
        self.shallow = nn.ModuleList(
            _branch(size, width, width // 8) for size, width in zip(shallow, (64, 128), strict=True)
        )
        self.deep = nn.ModuleList(_branch(size, 256, 16) for size in deep)
        self.merge_deep = _branch(256 * len(deep), 256, 16)
        self.merge = _branch(256 + 64 + 128, 256, 16)
        self.displacement_out = nn.Conv2d(256, 2, 1, bias=False)

    def edge(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Boundary logits.

        Args:
            features: The stages ``(B, D_i, h_i, w_i)``.
            grid: The stride-4 grid.

        Returns:
            ``(B, *grid)``.
        """
        found = [
            resize(branch(stage), grid).relu()
            for branch, stage in zip(self.edge_branches, _fit(features, grid), strict=True)
        ]
        return self.edge_out(torch.cat(found, 1))[:, 0]

    def displacement(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Displacements ``(B, 2, *grid)`` (rows, columns) to a common point of each object.

        Training fixes only their differences.
        """
        half = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        features = _fit(features, grid)
        deep = [
            resize(b(stage), half).relu() for b, stage in zip(self.deep, features[2:], strict=True)
        ]
        merged = resize(self.merge_deep(torch.cat(deep, 1)), grid).relu()
        shallow = [
            resize(branch(stage), grid).relu()
            for branch, stage in zip(self.shallow, features[:2], strict=True)
        ]
        return self.displacement_out(self.merge(torch.cat([*shallow, merged], 1)).relu())


def _branch(channels: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(groups, width))


def _fit(features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Bring stages that are finer than the grid to it before anything is computed from them."""
    return [resize(f, grid) if f.shape[2] > grid[0] else f for f in features]
