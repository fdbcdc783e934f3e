"""What LPCAM is plugged into: a classifier with local features and maps of its own."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from lpcam.data.loaders import ViewBatch, normalized
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.weights import load_state
from lpcam.prototypes.maps import HostViews
from lpcam.storage.hashing import digest


class Host(pl.LightningModule):
    """A network that LPCAM's maps take the place of CAM in.

    Its own maps split local features into foreground and context, and are the baseline that LPCAM's
    maps are compared with; its scores of cluster centres select prototypes.

    A subclass trains like any LightningModule, and saves all its arguments but the backbone as
    hyperparameters. It gives :meth:`own_maps` and :meth:`score`, or
    overrides :meth:`predict_step` where its maps are no function of its features.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.

    Attributes:
        maps_from_features: Whether :meth:`own_maps` can tell the maps from stored features alone.
        finishes: Whether :meth:`finish` does anything; then LPCAM's maps need more than features.
        needs_gradients: Whether prediction differentiates.
        precision: What the trainer runs it in; features differ by it.
        frozen: Whether only what lies behind the features is trained, so that training needs no
            pictures.
        batches: What it learns from; :func:`~lpcam.stages.batches.loaders` makes them:
            ``pictures`` with their labels, of which one that is frozen gets the mean features;
            ``grids`` of local features, for one that is frozen; ``pairs`` of pictures that share a
            class; ``seeds``, pictures with labels of their pixels.
        seeds: The label file of each picture by its id, for ``seeds``; given before training and
            before prediction.
        seeds_key: Hash of how they were made.
        title: What people call its own maps.
    """

    maps_from_features = True
    finishes = False
    needs_gradients = False
    frozen = False
    batches = "pictures"
    title = "CAM"
    precision = "32-true"

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.seeds: Mapping[str, Path] = {}
        self.seeds_key = ""

    def begin(self, base: "Host") -> None:
        """Take over from a trained host what training begins with; by default nothing.

        Args:
            base: The host that ``classifier.base`` names, trained.
        """

    def local_features(self, images: Tensor, labels: Tensor) -> Tensor:
        """Local features ``(B, D, h, w)`` of pictures; few hosts look at the labels ``(B, C)``."""
        return self.backbone(images)

    @abstractmethod
    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """The host's own maps of local features, not negative and not normalised.

        Args:
            features: Local features ``(N, D, h, w)``.
            classes: Indices of P classes; None for all.

        Returns:
            Maps ``(N, P, h, w)``.
        """

    @abstractmethod
    def score(self, vectors: Tensor) -> Tensor:
        """Class scores ``(N, C)`` of any vectors ``(N, D)`` in the place of mean features."""

    @property
    @abstractmethod
    def score_key(self) -> str:
        """Hash of what decides scores and own maps beyond the features."""

    @property
    def feature_key(self) -> str:
        """Hash of what decides the local features."""
        return digest([self.backbone.fingerprint, self.precision])

    @property
    def stride(self) -> int:
        """Pixels between two positions of the features' grid."""
        return self.backbone.stride

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the views of pictures on the device."""
        predicting = self.trainer.predicting
        return normalized(batch, self.backbone.mean, self.backbone.std) if predicting else batch

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        """Features and own maps of every scale.

        Returns:
            For each scale those of the pictures and, if the batch wants them, of their mirror
            images, from one forward pass.
        """
        scales = []
        for view in batch["views"]:
            features = self.view_features(view, batch)
            maps = self.own_maps(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            scales.append(HostViews(mirrored_back(features), mirrored_back(maps)))
        return scales

    def view_features(self, view: Tensor, batch: ViewBatch) -> Tensor:
        """Features ``(V, B, D, h, w)`` of a scale's pictures and, if wanted, mirror images."""
        views = [view, view.flip(3)] if batch["flip"] else [view]
        labels = batch["labels"].repeat(len(views), 1)
        return self.local_features(torch.cat(views), labels).unflatten(0, (len(views), -1))

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        """Turn LPCAM's maps of one scale into those of the host with LPCAM in it.

        Args:
            maps: Rectified maps of M settings and P classes ``(M, B, P, h, w)``.
            views: What the host gave at this scale.
            classes: Indices of the P classes.

        Returns:
            Maps of the same shape; by default those that were given.
        """
        return maps

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under this class's names, from a file that may be of the published code.

        Args:
            state: Weights by name.

        Returns:
            Those to load; by default those that were given.
        """
        return dict(state)

    def for_inference(self) -> Self:
        """A copy that gives the same features faster, see :meth:`Backbone.fused`."""
        twin = type(self)(self.backbone.fused(), **self.hparams)
        twin.precision = self.precision
        twin.seeds, twin.seeds_key = self.seeds, self.seeds_key
        state = self.state_dict()
        twin.load_state_dict({k: state[k] for k in state if not k.startswith("backbone.")}, False)
        return twin.eval()


def mirrored_back(views: Tensor) -> Tensor:
    """Turn what there is of a mirror image ``(V, ..., w)``, the second of the views, back."""
    return torch.cat([views[:1], views[1:].flip(-1)])


def load_host(path: Path, host: Host) -> Host:
    """Load a trained host for inference.

    Args:
        path: A checkpoint that training wrote, or a ``.safetensors`` file of its weights.
        host: The host as it was before its training; its weights are replaced.

    Raises:
        InputError: The file is missing, holds pickled objects, or belongs to another network or
            another number of classes.
    """
    state, wanted = host.renamed(load_state(path)), host.state_dict()
    for name in state.keys() & wanted.keys():
        found, shape = state[name].shape, wanted[name].shape
        of_classes = shape[:1] == (host.num_classes,) and not name.startswith("backbone.")
        if of_classes and found[1:] == shape[1:] and found[:1] != shape[:1]:
            raise InputError(
                f"ckpt={path}: a classifier of {found[0]} classes, the data set has "
                f"{host.num_classes}; give the checkpoint that belongs to it"
            )
    try:
        host.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"ckpt={path}: no {type(host).__name__} on {host.backbone.name}; choose the classifier "
            "and the backbone that it belongs to"
        ) from error
    return host.eval()
