"""Features of pictures, weights and prototypes, with the maps that the slow loops make of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.maps import HostViews, MapSetting, lpcam_setting
from lpcam.prototypes.prototype_set import Prototypes
from tests.oracles import multiscale

CLASSES = 4
CHANNELS = 6
SIZE = (37, 50)
# Class prototypes and context prototypes of each class.
COUNTS = ((3, 2), (1, 4), (2, 0), (4, 1))


def host_views(features: Sequence[Tensor], weight: Tensor) -> list[HostViews]:
    """What a classifier with these weights gives of features ``(V, B, D, h, w)`` of each scale."""
    head = LinearHead(weight)
    return [
        HostViews(views, head.own_maps(views.flatten(0, 1)).unflatten(0, views.shape[:2]))
        for views in features
    ]


@dataclass(frozen=True)
class Case:
    """Features of three pictures at three scales, class weights and prototypes."""

    features: list[Tensor]
    weight: Tensor
    prototypes: Prototypes

    @property
    def scales(self) -> list[HostViews]:
        return host_views(self.features, self.weight)

    def setting(self, kind: str) -> MapSetting:
        return MapSetting() if kind == "cam" else lpcam_setting(self.prototypes, kind)

    def expected(
        self, kind: str, picture: int, class_index: int, size: tuple[int, int] = SIZE
    ) -> np.ndarray:
        scales = [views[:, picture].double().numpy() for views in self.features]
        if kind == "cam":
            weight = self.weight[class_index].double().numpy()
            return multiscale.plain_map(scales, weight, size)
        return multiscale.prototype_map(scales, *self.sides(kind, class_index), size)

    def sides(self, kind: str, class_index: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Class prototypes and context prototypes that count, and what is added to their map."""
        foreground = self.prototypes.foreground[class_index].double().numpy()
        context = self.prototypes.context[class_index].double().numpy()
        return (
            foreground[:0] if kind == "context" else foreground,
            context[:0] if kind == "class" else context,
            1.0 if kind == "context" else 0.0,
        )


def random_case(seed: int, views: int = 2) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = [draw(views, 3, CHANNELS, *grid) for grid in ((2, 3), (3, 4), (5, 7))]
    foreground = tuple(draw(p, CHANNELS) * 5 for p, _ in COUNTS)
    context = tuple(draw(q, CHANNELS) * 5 for _, q in COUNTS)
    indices = tuple((list(range(p)), list(range(q))) for p, q in COUNTS)
    prototypes = Prototypes(("a", "b", "c", "d"), foreground, context, indices)
    return Case(features, draw(CLASSES, CHANNELS), prototypes)
