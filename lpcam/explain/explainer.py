"""LPCAM for any torch classifier: ``cam = LPCAM(model).fit(loader)``, then ``cam(images)``."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from lpcam.errors import InputError
from lpcam.explain.feature_layers import (
    evaluating,
    find_feature_layers,
    find_finer_layer,
    finer_features,
)
from lpcam.explain.views import SINGLE_VIEW, Views, check_pictures, view_features
from lpcam.functional import merge_scales, normalize_maps
from lpcam.prototypes.centers import Centers, Clustering
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.head import SIGNED, PrototypeHead
from lpcam.prototypes.maps import Propagation, from_scale_one, spread
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.prototypes.selection import Selection, fit_prototypes
from lpcam.settings import make
from lpcam.storage.hashing import tensors_digest

# Bytes that the maps of one call may take at the pictures' size, with what adding scales needs.
MAX_BYTES = 8 * 10**9


class LPCAM:
    """Local-prototype class activation maps of a trained classifier.

    The classifier's score has to be a linear layer on the mean of local features, as in ResNet,
    ConvNeXt, EfficientNet, RegNet, Swin, or a ViT that averages its patch tokens. Of a ViT that
    classifies by its class token the patch tokens are taken all the same, and a warning says that
    the maps are an approximation. The bias of that layer counts nowhere: not in CAM, and not in
    ``softmax(centre . w)`` that selects prototypes.

    The model is only read. Hooks live only inside a call, after which every module has its own
    training mode back. Pictures are moved to the model's device; maps stay there.

    Args:
        model: The classifier; it takes normalised pictures ``(B, 3, H, W)``.
        target_layer: The layer of the local features, or its dotted name, if the one that is found
            is not wanted; see :func:`~lpcam.explain.feature_layers.find_feature_layers`.
        classifier: The linear layer, or its dotted name, likewise.
        k: Clusters of foreground and of context features a class.
        classes: Names of the C classes in the order of the scores; by default their numbers.
        signed: What to do with features that may be negative (ConvNeXt, transformers): ``keep``
            them, ``relu``, or ``center``: subtract the mean feature of the fitted pictures. This
            concerns prototypes and what is compared with them, never the CAM of the classifier.
        activation: The paper's tau: where a class's CAM, in 0..1, reaches it lies foreground.
        class_score: The paper's mu_f: class prototypes score above it. Few centres reach 0.9 where
            there are hundreds of classes, or weights that were never trained for them; lower it
            then.
        context_score: The paper's mu_b: context prototypes score below it.
        context_floor: And above this; None for no bound. The published code has 0.05, for 20
            classes.
        seed: Seed of the clustering.
        max_iter: Upper bound on its iterations.
        example: Normalised pictures ``(B, 3, H, W)`` that the model takes, to find its layers with,
            or the shape ``(3, H, W)`` of random ones.

    Attributes:
        layers: Where features and class weights are found.
        centers: After a fit, the cluster centres before selection.

    Raises:
        InputError: An argument is unknown, or the layers cannot be found; with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | None = None,
        classifier: nn.Module | str | None = None,
        k: int = 12,
        *,
        classes: Sequence[str] | None = None,
        signed: str = "keep",
        activation: float = 0.1,
        class_score: float = 0.9,
        context_score: float = 0.9,
        context_floor: float | None = None,
        seed: int = 0,
        max_iter: int = 100,
        example: Tensor | Sequence[int] = (3, 224, 224),
    ) -> None:
        if signed not in SIGNED:
            raise InputError(f"signed={signed}: unknown; choose {', '.join(SIGNED)}")
        clustering = {
            "k": k,
            "activation": activation,
            "signed": signed,
            "seed": seed,
            "max_iter": max_iter,
        }
        selection = {
            "class_score": class_score,
            "context_score": context_score,
            "context_floor": context_floor,
        }
        # A class without pictures is left out; one with few features gets fewer clusters.
        self._clustering = make(Clustering, {**clustering, "allow_missing": True})
        self._selection = make(Selection, selection)
        if not isinstance(example, Tensor):
            example = torch.randn(2, *example, generator=torch.Generator().manual_seed(0))
        self.model = model
        self.layers = find_feature_layers(
            model, example.to(next(model.parameters())), target_layer, classifier
        )
        scores = len(self.layers.weight)
        self.classes = tuple(str(c) for c in (classes or range(scores)))
        if len(self.classes) != scores:
            raise InputError(
                f"classes: {len(self.classes)} names for the {scores} scores of the layer "
                f"{self.layers.classifier_name}; give one for each"
            )
        self._settings: dict[str, Any] = {
            **clustering,
            **selection,
            "target_layer": self.layers.name,
            "classifier": self.layers.classifier_name,
            "example": list(example.shape[1:]),
        }
        self.centers: Centers | None = None
        self._head: PrototypeHead | None = None

    def __repr__(self) -> str:
        """Where features and scores come from, and how much is fitted."""
        fitted = len(self._head.fitted) if self._head else 0
        return (
            f"LPCAM({type(self.model).__name__}, target_layer={self.layers.name!r}, "
            f"classifier={self.layers.classifier_name!r}): "
            f"{fitted} of {len(self.classes)} classes fitted"
        )

    @property
    def head(self) -> PrototypeHead:
        """What makes maps from features; an InputError before anything is fitted."""
        if self._head is None:
            raise InputError("LPCAM: not fitted; call fit(loader) first, or LPCAM.load")
        return self._head

    @cached_property
    def finer(self) -> nn.Module:
        """The earlier stage that maps propagate by; an InputError if the model has none."""
        example = torch.zeros(1, *self._settings["example"]).to(self.layers.classifier.weight)
        return find_finer_layer(self.model, self.layers, example)

    @property
    def prototypes(self) -> Prototypes:
        """The fitted prototypes; assign an edited set, ``cam.prototypes.drop("cat", [3])``.

        Raises:
            InputError: Nothing is fitted yet, or the set has other classes or channels.
        """
        return self.head.prototypes

    @prototypes.setter
    def prototypes(self, value: Prototypes) -> None:
        scores, dim = self.layers.weight.shape
        found = sorted({tensor.shape[1] for tensor in value.foreground + value.context})
        if len(value.classes) != scores or found != [dim]:
            raise InputError(
                f"prototypes: {len(value.classes)} classes of {found} channels for a model of "
                f"{scores} classes of {dim}; give the model that they were fitted on"
            )
        self._head = PrototypeHead(value).to(self.layers.weight.device)

    def features(self, images: Tensor) -> Tensor:
        """Local features ``(B, D, h, w)`` of pictures ``(B, 3, H, W)``, as the model has them."""
        check_pictures(images)
        with evaluating(self.model):
            return self.layers.features(self.model, images.to(self.layers.classifier.weight))

    def fit(self, loader: Iterable[Any], *, progress: bool = True) -> "LPCAM":
        """Fit prototypes in one pass over pictures.

        The features lie in a temporary folder meanwhile, half precision, and are gone afterwards,
        errors or not. No more than one class's are in memory.

        Args:
            loader: Batches of (images ``(B, 3, H, W)``, multi-hot labels ``(B, C)``). The sizes of
                pictures may differ between batches. A class without a picture is left out.
            progress: Show bars.

        Raises:
            InputError: The labels do not fit the classifier, or features are not finite.
        """
        labels: list[np.ndarray] = []
        with tempfile.TemporaryDirectory(prefix="lpcam-") as folder:
            for images, batch_labels in track(loader, "Features", disable=not progress):
                marked = self._multi_hot(batch_labels, len(images)).cpu().numpy()
                features = self.features(images).permute(0, 2, 3, 1).half().cpu().numpy()
                for picture, shown in zip(features, marked, strict=True):
                    np.save(Path(folder, f"{len(labels)}.npy"), picture)
                    labels.append(shown)
            return self.fit_features(
                lambda i: np.load(Path(folder, f"{i}.npy"), allow_pickle=False),
                np.array(labels, bool).reshape(-1, len(self.classes)),
                progress=progress,
            )

    def fit_features(
        self,
        features: Sequence[np.ndarray] | Callable[[int], np.ndarray],
        labels: np.ndarray,
        *,
        progress: bool = True,
    ) -> "LPCAM":
        """Fit prototypes to features that are there already, :meth:`features` of single pictures.

        Args:
            features: Features ``(h, w, D)`` of each picture: a list, a memory-mapped array, or a
                function of the picture's index.
            labels: Multi-hot labels ``(N, C)``.
            progress: Show a bar.

        Raises:
            InputError: The labels do not fit the classifier, or features are not finite.
        """
        read = features if callable(features) else features.__getitem__
        marked = self._multi_hot(torch.as_tensor(labels), len(labels)).numpy()
        if not marked.any():
            raise InputError("labels: no picture shows any class; mark what it shows with a 1")
        weight = self.layers.weight.float().cpu()
        self.centers, prototypes = fit_prototypes(
            lambda index: np.array(read(index), np.float16),
            marked,
            LinearHead(weight),
            self.classes,
            self._clustering,
            self._selection,
            dim=weight.shape[1],
            progress=progress,
        )
        fingerprint = tensors_digest(self.model.state_dict())
        self.prototypes = replace(prototypes, model=fingerprint, settings=self._settings)
        return self

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        views: Views = SINGLE_VIEW,
        aggregate: str = "mean",
        propagate: float = 0.0,
        frames: int = 0,
    ) -> Tensor:
        """Maps of all asked classes, from one forward pass a scale.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.
            labels: Multi-hot labels ``(B, C)``, the classes to map in each picture; None for all
                fitted ones.
            views: Pairs (scale, whether mirrored), such as ``lpcam.explain.views.PAPER_VIEWS``.
                Features of a picture and its mirror image are averaged, maps of scales are added.
            aggregate: How similarities to several prototypes become one: ``mean`` (the paper),
                ``max``, ``topk`` or ``lse``; see :meth:`~lpcam.prototypes.head.PrototypeHead.maps`.
            propagate: Sharpness of a step between each picture's own positions, which carries the
                maps to the edges of objects, see :func:`~lpcam.functional.propagate`; 3 is good, 0
                is no such step. Part of one more forward pass is its cost.
            frames: Of a video, pictures before and after each whose positions take part in that
                step: the pictures are its frames in order. Maps then flicker less.

        Returns:
            ``(B, C, H, W)`` in 0..1; zero for a class that is not asked for, or not fitted.

        Raises:
            InputError: Nothing is fitted, an argument has a wrong shape or value, the maps would
                take more than 8 GB, or the model has no finer layer to propagate by.
        """
        heads = [self._lpcam(aggregate)]
        return self._maps(images, labels, views, heads, propagate, frames)[0]

    def compare(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        views: Views = SINGLE_VIEW,
        aggregate: str = "mean",
    ) -> tuple[Tensor, Tensor]:
        """Maps as from a call, and those of plain CAM from the same forward passes.

        Returns:
            Both ``(B, C, H, W)`` in 0..1. CAM also has maps of asked classes that are not fitted.

        Raises:
            InputError: As in a call; both maps count.
        """
        heads = [self._lpcam(aggregate), self._cam]
        lpcam, cam = self._maps(images, labels, views, heads)
        return lpcam, cam

    def similarity(self, images: Tensor, name: str | int, side: str = "class") -> Tensor:
        """Cosine to every prototype of one class and side.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.
            name: The class, by name or index.
            side: ``class`` or ``context``.

        Returns:
            ``(B, P, H, W)`` in -1..1, in the order of ``prototypes.indices``.
        """
        cosine = self.head.similarity(self.features(images), name, side)
        return F.interpolate(cosine, images.shape[2:], mode="bilinear", align_corners=False)

    def save(self, path: str | Path) -> None:
        """Write the prototypes, with the model's fingerprint, as one safetensors file."""
        self.prototypes.save(Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> "LPCAM":
        """Read what :meth:`save` wrote, or the prototypes in a run's folder.

        Args:
            path: The file.
            model: The model that the prototypes were fitted on.

        Raises:
            InputError: The file is missing or damaged, or belongs to another model.
        """
        prototypes = Prototypes.load(Path(path))
        fingerprint = tensors_digest(model.state_dict())
        if prototypes.model not in ("", fingerprint):
            raise InputError(
                f"{path}: prototypes of a model with fingerprint {prototypes.model}, this one has "
                f"{fingerprint}; load the weights that they were fitted on"
            )
        cam = cls(model, **prototypes.settings)
        cam.prototypes = prototypes
        cam.classes = prototypes.classes
        return cam

    def _maps(
        self,
        images: Tensor,
        labels: Tensor | None,
        views: Views,
        heads: Sequence[Callable[[Tensor, Tensor], Tensor]],
        sharpness: float = 0.0,
        frames: int = 0,
    ) -> list[Tensor]:
        """Maps ``(B, C, H, W)`` of several heads from the same forward passes."""
        check_pictures(images)
        if not 0 <= sharpness <= 100:
            raise InputError(f"propagate={sharpness}: give a sharpness in 0..100")
        if frames < 0 or (frames and not sharpness):
            raise InputError(
                f"frames={frames}: give a number of frames, and propagate=3 by which they meet"
            )
        weight = self.layers.weight
        if labels is None:
            asked = torch.zeros(len(images), len(weight), dtype=torch.bool)
            asked[:, self.head.fitted] = True
        else:
            asked = self._multi_hot(labels, len(images))
        views = list(views)
        factors = sorted({scale for scale, _ in views})
        self._check_memory(asked, len(heads), len(factors), (images.shape[2], images.shape[3]))
        asked = asked.to(weight.device)
        maps = [weight.new_zeros(*asked.shape, *images.shape[2:]) for _ in heads]
        present = asked.any(0).nonzero()[:, 0]
        if not len(present):
            return maps
        by_scale: list[list[Tensor]] = [[] for _ in heads]
        added: list[Tensor] = []
        for features in view_features(self.features, images, views):
            if sharpness:
                added.append(features.sum(0))
            with torch.autocast(weight.device.type, enabled=False):
                for head, found in zip(heads, by_scale, strict=True):
                    found.append(head(features, present)[asked[:, present]])
        for full, found in zip(maps, by_scale, strict=True):
            full[asked] = normalize_maps(merge_scales(found, (images.shape[2], images.shape[3])))
            if sharpness:
                used = from_scale_one(added, factors)
                step = Propagation(sharpness)
                with torch.autocast(weight.device.type, enabled=False):
                    self._propagate(full, asked, images, used, step, frames)
        return maps

    def _check_memory(self, asked: Tensor, heads: int, scales: int, size: tuple[int, int]) -> None:
        # Those of all classes are returned. Those asked for exist twice a scale while scales are
        # added, and three times while they are normalised.
        count = heads * asked.numel() + int(asked.sum()) * (2 * scales + 1)
        total = self.layers.weight.element_size() * count * size[0] * size[1]
        if total > MAX_BYTES:
            shape = " x ".join(str(side) for side in (*asked.shape, *size))
            raise InputError(
                f"images: maps of {shape} (pictures, classes, height, width) take "
                f"{total / 1e9:.1f} GB of memory, the bound is {MAX_BYTES / 1e9:g}; give fewer "
                "pictures a call, smaller ones (--side), or a model with fewer classes"
            )

    def _propagate(
        self,
        maps: Tensor,
        asked: Tensor,
        images: Tensor,
        added: Sequence[Tensor],
        step: Propagation,
        frames: int,
    ) -> None:
        """Carry maps ``(B, C, H, W)`` on, in place.

        Args:
            maps: The maps.
            asked: Which of them are wanted ``(B, C)`` bool.
            images: The pictures.
            added: Features of scale 1 and the larger ones, views added ``(B, D, h, w)``.
            step: How.
            frames: Pictures before and after each that take part.
        """
        images = images.to(self.layers.classifier.weight)
        stages = finer_features(self.model, self.finer, images)
        features = list(zip(*added, strict=True))
        before = maps.clone() if frames else maps
        for place, shown in enumerate(asked):
            if not shown.any():
                continue
            near = range(max(place - frames, 0), min(place + frames + 1, len(maps)))
            here, *beside = (
                (before[other, shown], features[other], stages[other])
                for other in sorted(near, key=lambda other: other != place)
            )
            maps[place, shown] = spread(*here, step, maps.shape[2:], beside=beside)

    def _lpcam(self, aggregate: str) -> Callable[[Tensor, Tensor], Tensor]:
        head = self.head
        return lambda views, present: head.maps(views.mean(0), present, aggregate)

    def _cam(self, views: Tensor, present: Tensor) -> Tensor:
        maps = LinearHead(self.layers.weight).own_maps(views.flatten(0, 1), present)
        return maps.unflatten(0, views.shape[:2]).sum(0)

    def _multi_hot(self, labels: Tensor, count: int) -> Tensor:
        if tuple(labels.shape) != (count, len(self.classes)):
            raise InputError(
                f"labels: shape {tuple(labels.shape)}; give multi-hot labels of shape "
                f"({count}, {len(self.classes)})"
            )
        return labels != 0
