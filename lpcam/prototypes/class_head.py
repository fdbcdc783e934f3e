"""What prototypes need of a classifier: its own maps, and its scores of vectors."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lpcam.functional import class_activation_map


class ClassHead(Protocol):
    """Tells foreground from context, and what a vector in a feature's place would score."""

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Maps ``(N, P, h, w)``, not negative, of features ``(N, D, h, w)`` and P classes."""

    def score(self, vectors: Tensor) -> Tensor:
        """Class scores ``(N, C)`` of vectors ``(N, D)``."""


@dataclass(frozen=True)
class LinearHead:
    """A linear layer on the mean of local features, without bias; its own maps are plain CAM.

    Attributes:
        weight: Class weights ``(C, D)``.
    """

    weight: Tensor

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Plain CAM of P classes ``(N, P, h, w)``, of all without ``classes``."""
        weight = self.weight if classes is None else self.weight[classes]
        return class_activation_map(features, weight.to(features))

    def score(self, vectors: Tensor) -> Tensor:
        """Class scores ``(N, C)`` of vectors ``(N, D)``."""
        return vectors @ self.weight.to(vectors).T
