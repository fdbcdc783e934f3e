"""Trained hosts whose own maps are made anew: from pictures that are changed step by step."""

from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lpcam.data.loaders import ViewBatch
from lpcam.models.host import Host
from lpcam.prototypes.maps import HostViews
from lpcam.settings import make
from lpcam.storage.hashing import digest


class RemadeMaps(Host):
    """A trained host with other own maps; all else is its own.

    Only classes that a picture shows have maps. They split the features, which stay those of
    pictures as they are.

    Args:
        host: The trained host.
        **options: The settings.

    Attributes:
        settings: The dataclass of what a subclass can be told; it is part of the maps' key.
    """

    maps_from_features = False
    settings: ClassVar[type]

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host.backbone, host.num_classes)
        self.host = host.requires_grad_(False)
        self.how: Any = make(self.settings, options, "maps.{}".format)
        self.precision = host.precision
        self.finishes = host.finishes

    @abstractmethod
    def remake(self, views: Tensor, labels: Tensor, class_index: int, width: int) -> Tensor:
        """The map of a class.

        Args:
            views: A picture and its mirror image ``(V, 3, H, W)``; V may be 1.
            labels: The picture's labels ``(C,)``, for hosts whose features depend on them.
            class_index: The class.
            width: Of the picture before it was scaled.

        Returns:
            The map of each view, mirrored back ``(V, h, w)``.
        """

    def local_features(self, images: Tensor, labels: Tensor) -> Tensor:  # noqa: D102 - inherited
        return self.host.local_features(images, labels)

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """The host's own maps, before anything is changed."""
        return self.host.own_maps(features, classes)

    def score(self, vectors: Tensor) -> Tensor:
        """The host's scores."""
        return self.host.score(vectors)

    @property
    def score_key(self) -> str:
        """Hash of the host's, and of the settings."""
        return digest([self.host.score_key, asdict(self.how)])

    @property
    def feature_key(self) -> str:
        """The host's."""
        return self.host.feature_key

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        """Features of the pictures as they are, and maps of what becomes of them."""
        scales = []
        found = self.host.predict_step(batch, batch_idx)
        for images, views in zip(batch["views"], found, strict=True):
            assert views.maps is not None
            maps = torch.zeros_like(views.maps)
            for b, c in batch["labels"].nonzero().tolist():
                both = torch.stack([images[b], images[b].flip(2)][: len(maps)])
                maps[:, b, c] = self.remake(both, batch["labels"][b], c, batch["size"][1])
            scales.append(views._replace(maps=maps))
        return scales

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        """What the host does."""
        return self.host.finish(maps, views, classes)

    def for_inference(self) -> Self:  # noqa: D102 - inherited
        return type(self)(self.host.for_inference(), **asdict(self.how)).eval()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The host's: there is nothing else to load."""
        return self.host.state_dict(*args, **options)
