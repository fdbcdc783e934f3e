"""Clustering: the centres of each class's local features (section 3.2 of the paper)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpcam.errors import InputError
from lpcam.prototypes.class_head import ClassHead
from lpcam.prototypes.head import transform
from lpcam.prototypes.kmeans import CHUNK, cosine_to_center, spherical_kmeans
from lpcam.prototypes.local_features import Draw, LocalFeatures, draw_pictures, split_features
from lpcam.prototypes.prototype_set import SIDES
from lpcam.settings import CHECKED, Count, Seed, Share


@dataclass(frozen=True)
class Centers:
    """Cluster centres of every class and side, before selection.

    Attributes:
        centers: Raw means ``(C, 2, K, D)``; side 0 foreground, side 1 context. All zero for a class
            that was skipped.
        counts: Features in each cluster ``(C, 2, K)``; 0 where there is no cluster.
        nearest: The features nearest to each centre, best first, at most one a picture:
            ``(C, 2, K, n, 3)`` picture index, grid row, grid column; -1 where there is none.
        signed: What was done to the features first, see :class:`Clustering`.
        mean: What ``center`` subtracted ``(D,)``; None otherwise.
    """

    centers: Tensor
    counts: Tensor
    nearest: Tensor
    signed: str = "keep"
    mean: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, Tensor)}
        save_file(tensors, path, {"signed": self.signed})

    @classmethod
    def load(cls, path: Path) -> "Centers":
        """Read what :meth:`save` wrote."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tensors, signed=(file.metadata() or {}).get("signed", "keep"))

    @classmethod
    def together(cls, parts: Sequence["Centers"]) -> "Centers":
        """All centres, of which each part has some classes'.

        Args:
            parts: Class c is taken from the one at c modulo their number, see
                :func:`~lpcam.storage.ranks.dealt`.
        """
        first = parts[0]

        def merged(name: str) -> Tensor:
            owners = (parts[c % len(parts)] for c in range(len(first.centers)))
            return torch.stack([getattr(owner, name)[c] for c, owner in enumerate(owners)])

        centers, counts, nearest = map(merged, ("centers", "counts", "nearest"))
        return cls(centers, counts, nearest, first.signed, first.mean)


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Clustering:
    """How local features are split and clustered.

    Attributes:
        k: Clusters of foreground and of context features a class.
        activation: The paper's tau: where a class's own map, in 0..1, reaches it lies foreground.
        split: Which map that is: ``single_view``, of the features themselves as in the paper, or
            ``multi_scale``, see :func:`~lpcam.prototypes.maps.sampled_maps`, as in the published
            code.
        signed: What happens to features that may be negative, see
            :func:`~lpcam.prototypes.head.transform`; ``center`` subtracts the mean over the
            clustered pictures of their mean features. The split uses them as they are; the score of
            a centre is that of the centre of transformed features.
        init: Where k-means starts: ``k-means++``, or ``random`` features as in the published code.
        tol: See :func:`~lpcam.prototypes.kmeans.spherical_kmeans`.
        max_iter: Upper bound on its iterations.
        seed: Seed of its start.
        allow_missing: Skip a class without pictures instead of failing, and make as many clusters
            as there are features where these are fewer than k.
    """

    k: Count = 12
    activation: Share = 0.1
    split: Literal["single_view", "multi_scale"] = "single_view"
    signed: Literal["keep", "relu", "center"] = "keep"
    init: Literal["k-means++", "random"] = "k-means++"
    tol: Annotated[float, Field(ge=0)] = 1e-4
    max_iter: Count = 100
    seed: Seed = 0
    allow_missing: bool = False


def cluster(
    features: LocalFeatures, k: int, settings: Clustering, *, nearest: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster one side of one class.

    Args:
        features: Its features.
        k: Number of clusters.
        settings: How; its own ``k`` is not read.
        nearest: How many features are remembered for each centre.

    Returns:
        Centres ``(K, D)``, counts ``(K,)`` and nearest features ``(K, nearest, 3)``, as in
        :class:`Centers`.

    Raises:
        InputError: There are fewer features than clusters.
    """
    start = None
    if settings.init == "random":
        candidates = _with_direction(features.rows).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(candidates), generator=generator)[:k]
        start = features.rows[candidates[order]]
    result = spherical_kmeans(
        features.rows,
        k,
        init=start,
        seed=settings.seed,
        max_iter=settings.max_iter,
        tol=settings.tol,
    )
    counts = torch.bincount(result.labels[result.labels >= 0], minlength=k)
    places = torch.full((k, nearest, 3), -1, dtype=torch.int32)
    cosine = cosine_to_center(features.rows, result.centers, result.labels)
    for j in range(k):
        member = (result.labels == j).nonzero()[:, 0]
        seen: set[int] = set()
        for row in features.places[member[cosine[member].argsort(descending=True, stable=True)]]:
            if len(seen) == nearest:
                break
            if int(row[0]) not in seen:
                places[j, len(seen)] = row
                seen.add(int(row[0]))
    return result.centers, counts, places


def _with_direction(rows: Tensor) -> Tensor:
    """Which rows are not zero ``(N,)``; all at once would take a byte for each number."""
    return torch.cat([chunk.any(1) for chunk in rows.split(CHUNK)])


def _mean_feature(read: Callable[[int], np.ndarray], pictures: Collection[int]) -> Tensor:
    """The mean ``(D,)`` over pictures of their mean features."""
    means = [read(index).mean((0, 1), dtype=np.float64) for index in sorted(pictures)]
    return torch.from_numpy(np.mean(means, 0)).float()


def fit_centers(
    read: Callable[[int], np.ndarray],
    labels: np.ndarray,
    head: ClassHead,
    classes: Sequence[str],
    settings: Clustering,
    *,
    dim: int,
    read_map: Callable[[int, int], np.ndarray] | None = None,
    chosen: Sequence[Sequence[int]] | None = None,
    only: Collection[int] | None = None,
    progress: bool = False,
) -> Centers:
    """Collect and cluster, class by class (section 3.2 of the paper).

    No more than one class's features are held at any time.

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        labels: Image labels ``(N, C)``.
        head: The classifier's; its own maps split the features.
        classes: Names of the C classes.
        settings: How features are split and clustered.
        dim: Channels D of the features.
        read_map: Gives a picture's map of a class by both indices, in the place of the head's; see
            :func:`~lpcam.prototypes.local_features.split_features`.
        chosen: For each class the pictures to use; by default all that show it.
        only: Indices of the classes to cluster; by default all. The others' centres stay zero.
        progress: Show a bar.

    Raises:
        InputError: Unless ``allow_missing``, a class has no picture, or a side of it fewer features
            than clusters.
    """
    k = settings.k
    centers = torch.zeros(len(classes), 2, k, dim)
    counts = torch.zeros(len(classes), 2, k, dtype=torch.int64)
    nearest = torch.full((len(classes), 2, k, 6, 3), -1, dtype=torch.int32)
    if chosen is None:
        chosen = draw_pictures(labels, Draw())
    signed = settings.signed
    mean = _mean_feature(read, set().union(*chosen)) if signed == "center" else None

    def fit_class(c: int) -> None:
        # A function, so that the features are gone before those of the next class come.
        sides = split_features(
            read,
            chosen[c],
            head,
            c,
            settings.activation,
            transform=None if signed == "keep" else lambda rows: transform(rows, signed, mean),
            read_map=None if read_map is None else lambda index: read_map(index, c),
            strict=settings.split == "multi_scale",
        )
        for side, features in enumerate(sides):
            n = k
            if settings.allow_missing:
                n = min(k, int(_with_direction(features.rows).sum()))
                if n == 0:
                    continue
            try:
                fitted = cluster(features, n, settings)
            except InputError as error:
                raise InputError(
                    f"prototypes of class {classes[c]!r}, {SIDES[side]}: {error}, change "
                    "thresholds.activation or set prototypes.allow_missing=true"
                ) from error
            centers[c, side, :n], counts[c, side, :n], nearest[c, side, :n] = fitted

    wanted = range(len(classes)) if only is None else sorted(only)
    for c in track(wanted, "Clustering", disable=not progress):
        if chosen[c]:
            fit_class(c)
        elif not settings.allow_missing:
            raise InputError(
                f"class {classes[c]!r} has no picture to learn prototypes from; "
                "add some or set prototypes.allow_missing=true"
            )
    return Centers(centers, counts, nearest, signed, mean)
