"""The head of DeepLabV2, which AMN shares."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SumHead(nn.Module):
    """DeepLabV2's atrous spatial pyramid pooling: the sum of dilated 3x3 convolutions.

    Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
    Convolution, and Fully Connected CRFs", TPAMI 2018, Section 3.2.

    Args:
        dim: Channels of the features.
        outputs: Channels of the result.
        rates: A branch for each dilation.
    """

    def __init__(self, dim: int, outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        branches = [nn.Conv2d(dim, outputs, 3, padding=rate, dilation=rate) for rate in rates]
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            if branch.bias is not None:
                nn.init.zeros_(branch.bias)
        self.branches = nn.ModuleList(branches)

    def forward(self, features: Tensor) -> Tensor:
        """Sums ``(B, outputs, h, w)`` of features ``(B, D, h, w)``."""
        return sum((branch(features) for branch in self.branches[1:]), self.branches[0](features))

    def everywhere(self, vectors: Tensor) -> Tensor:
        """What a map gives that holds a vector of ``(N, dim)`` everywhere ``(N, outputs)``.

        A convolution there is a product with the sum of its taps.
        """
        branches: list[Any] = list(self.branches)
        taps = torch.stack([branch.weight.detach().sum((2, 3)) for branch in branches]).sum(0)
        bias = torch.stack([branch.bias.detach() for branch in branches]).sum(0)
        return vectors @ taps.to(vectors).T + bias.to(vectors)
