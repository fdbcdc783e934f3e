"""Prototypes: cluster local features, select what to keep (section 3.2 of the paper)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpcam.errors import InputError
from lpcam.kmeans import CHUNK, single_precision, spherical_kmeans
from lpcam.local_features import LocalFeatures, choose_pictures, split_features
from lpcam.prototype_head import transform
from lpcam.prototype_set import SIDES, Prototypes


@dataclass(frozen=True)
class Centers:
    """Cluster centres of every class and side, before selection.

    Attributes:
        centers: Raw means ``(C, 2, K, D)``; side 0 foreground, side 1 context. All zero for a class
            that was skipped.
        counts: Features in each cluster ``(C, 2, K)``; 0 where there is no cluster.
        nearest: The features nearest to each centre, best first, at most one a picture:
            ``(C, 2, K, n, 3)`` picture index, grid row, grid column; -1 where there is none.
    """

    centers: Tensor
    counts: Tensor
    nearest: Tensor

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({k: v.contiguous() for k, v in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> "Centers":
        """Read what :meth:`save` wrote."""
        with safe_open(path, "pt") as file:
            return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def cluster(
    features: LocalFeatures,
    k: int,
    *,
    seed: int,
    max_iter: int,
    init: str = "k-means++",
    tol: float = 1e-4,
    nearest: int = 6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster one side of one class.

    Returns:
        Centres ``(K, D)``, counts ``(K,)`` and nearest features ``(K, nearest, 3)``, as in
        :class:`Centers`.

    Raises:
        InputError: ``init`` is unknown, or there are fewer features than clusters.
    """
    start = None
    if init == "random":
        candidates = _with_direction(features.rows).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(candidates), generator=generator)[:k]
        start = features.rows[candidates[order]]
    elif init != "k-means++":
        raise InputError(f"prototypes.init={init}: unknown; choose k-means++ or random")
    result = spherical_kmeans(features.rows, k, init=start, seed=seed, max_iter=max_iter, tol=tol)
    counts = torch.bincount(result.labels[result.labels >= 0], minlength=k)
    places = torch.full((k, nearest, 3), -1, dtype=torch.int32)
    cosine = _own_cosine(features.rows, result.centers, result.labels)
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


def _own_cosine(rows: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Cosine ``(N,)`` of each row to the centre of its cluster."""
    unit = F.normalize(centers, dim=1).T
    cosine = centers.new_empty(len(rows))
    for part, own in single_precision(rows):
        product = (own @ unit).gather(1, labels[part, None].clamp_min(0))[:, 0]
        cosine[part] = product / torch.linalg.vector_norm(own, dim=1).clamp_min(1e-12)
    return cosine


def fit_centers(
    read: Callable[[int], np.ndarray],
    labels: np.ndarray,
    weight: Tensor,
    classes: Sequence[str],
    *,
    k: int,
    tau: float,
    seed: int = 0,
    init: str = "k-means++",
    tol: float = 1e-4,
    max_iter: int = 100,
    allow_missing: bool = False,
    read_cam: Callable[[int, int], np.ndarray] | None = None,
    chosen: Sequence[Sequence[int]] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Centers:
    """Collect and cluster, class by class (section 3.2 of the paper).

    No more than one class's features are held at any time.

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        labels: Image labels ``(N, C)``.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        k: Clusters on each side.
        tau: Threshold of the split.
        seed: Seed of the clustering.
        init: Where the clustering starts: ``k-means++``, or ``random`` features as in the
            published code.
        tol: See :func:`~lpcam.kmeans.spherical_kmeans`.
        max_iter: Upper bound on its iterations.
        allow_missing: Skip a class without pictures instead of failing, and make as many clusters
            as there are features where these are fewer than k.
        read_cam: Gives a picture's CAM of a class by both indices, see
            :func:`~lpcam.local_features.split_features`.
        chosen: For each class the pictures to use, see
            :func:`~lpcam.local_features.choose_pictures`; by default all that show it.
        transform: See :func:`~lpcam.local_features.split_features`.
        progress: Show a bar.

    Raises:
        InputError: Unless ``allow_missing``, a class has no picture, or a side of it fewer features
            than clusters.
    """
    num_classes, dim = weight.shape
    centers = torch.zeros(num_classes, 2, k, dim)
    counts = torch.zeros(num_classes, 2, k, dtype=torch.int64)
    nearest = torch.full((num_classes, 2, k, 6, 3), -1, dtype=torch.int32)
    if chosen is None:
        chosen = choose_pictures(labels)

    def fit_class(c: int) -> None:
        # A function, so that the features are gone before those of the next class come.
        sides = split_features(
            read,
            chosen[c],
            weight[c],
            tau,
            transform,
            None if read_cam is None else lambda index: read_cam(index, c),
        )
        for side, features in enumerate(sides):
            n = min(k, int(_with_direction(features.rows).sum())) if allow_missing else k
            if allow_missing and n == 0:
                continue
            try:
                fitted = cluster(features, n, seed=seed, max_iter=max_iter, init=init, tol=tol)
            except InputError as error:
                raise InputError(
                    f"prototypes of class {classes[c]!r}, {SIDES[side]}: {error}"
                ) from error
            centers[c, side, :n], counts[c, side, :n], nearest[c, side, :n] = fitted

    for c, name in enumerate(track(classes, "Clustering", disable=not progress)):
        if chosen[c]:
            fit_class(c)
        elif not allow_missing:
            raise InputError(
                f"class {name!r} has no picture to learn prototypes from; "
                "add some or set prototypes.allow_missing=true"
            )
    return Centers(centers, counts, nearest)


def select_prototypes(
    centers: Tensor,
    weight: Tensor,
    class_index: int,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Tensor:
    """Choose centres by the classifier's own score of them, ``softmax(centre . w)`` (section 3.2).

    Args:
        centers: Raw centres ``(k, D)``.
        weight: Class weights ``(C, D)``.
        class_index: The class whose probability is compared.
        minimum: Keep only centres above it, strictly.
        maximum: Keep only centres below it, strictly.

    Returns:
        Which to keep ``(k,)`` bool.
    """
    score = class_score(centers, weight, class_index)
    keep = torch.ones_like(score, dtype=torch.bool)
    if minimum is not None:
        keep &= score > minimum
    if maximum is not None:
        keep &= score < maximum
    return keep


def class_score(centers: Tensor, weight: Tensor, class_index: int) -> Tensor:
    """The classifier's probability of a class for each centre, ``(k,)``."""
    return (centers @ weight.T).softmax(1)[:, class_index]


def select(
    centers: Centers,
    weight: Tensor,
    classes: Sequence[str],
    *,
    class_minimum: float,
    context_maximum: float,
    context_minimum: float | None = None,
    fallback: str = "best",
) -> Prototypes:
    """Select the prototypes of every class.

    A class may keep no context prototype at all; then nothing is subtracted.

    Args:
        centers: All centres.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        class_minimum: The paper's mu_f.
        context_maximum: The paper's mu_b.
        context_minimum: Drops context centres with next to no score; in the published code only.
        fallback: What happens to a class of which no centre passes: it keeps its ``best`` one, with
            a warning, or that is an ``error``.

    Raises:
        InputError: No centre of a class passes and ``fallback`` is ``error``, or it is unknown.
    """
    if fallback not in ("best", "error"):
        raise InputError(f"prototypes.fallback={fallback}: unknown; choose best or error")
    own, context, indices = [], [], []
    for c, name in enumerate(classes):
        foreground, background = centers.centers[c]
        filled = centers.counts[c] > 0
        keep = filled[0] & select_prototypes(foreground, weight, c, minimum=class_minimum)
        if filled[0].any() and not keep.any():
            # An empty cluster's zero centre would score 1 / C.
            score = class_score(foreground, weight, c).where(filled[0], 0)
            if fallback == "error":
                raise InputError(
                    f"class {name!r}: no prototype scores above {class_minimum}, the best one "
                    f"{float(score.max()):.3f}; lower thresholds.class_score or set "
                    "prototypes.fallback=best"
                )
            keep[score.argmax()] = True
            warnings.warn(
                f"class {name!r}: no prototype scores above {class_minimum}, "
                f"kept the best one ({float(score.max()):.3f})",
                stacklevel=2,
            )
        keep_context = filled[1] & select_prototypes(
            background, weight, c, minimum=context_minimum, maximum=context_maximum
        )
        own.append(foreground[keep])
        context.append(background[keep_context])
        indices.append((keep.nonzero()[:, 0].tolist(), keep_context.nonzero()[:, 0].tolist()))
    return Prototypes(tuple(classes), tuple(own), tuple(context), tuple(indices))


def fit_prototypes(
    read: Callable[[int], np.ndarray],
    labels: np.ndarray,
    weight: Tensor,
    classes: Sequence[str],
    *,
    k: int,
    signed: str,
    activation: float,
    class_score: float,
    context_score: float,
    context_floor: float | None,
    seed: int,
    max_iter: int,
    progress: bool = False,
) -> tuple[Centers, Prototypes]:
    """Collect, cluster and select with one set of settings, leaving out classes without pictures.

    Args:
        read: As for :func:`fit_centers`, like the arguments up to ``k``.
        labels: Image labels ``(N, C)``, at least one of them set.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        k: Clusters on each side, fewer where there are fewer features.
        signed: What happens to features that may be negative, see
            :func:`~lpcam.prototype_head.transform`. The split by CAM uses them as they are; the
            score of a centre is that of the centre of transformed features.
        activation: Threshold of the split.
        class_score: The paper's mu_f.
        context_score: The paper's mu_b.
        context_floor: Lower bound on the score of context; None for none.
        seed: Seed of the clustering.
        max_iter: Upper bound on its iterations.
        progress: Show a bar.

    Returns:
        All centres, and the prototypes among them.
    """
    mean = None
    if signed == "center":
        shown = np.flatnonzero(labels.any(1)).tolist()
        means = [read(index).mean((0, 1), dtype=np.float64) for index in shown]
        mean = torch.from_numpy(np.mean(means, 0)).float()
    centers = fit_centers(
        read,
        labels,
        weight,
        classes,
        k=k,
        tau=activation,
        seed=seed,
        max_iter=max_iter,
        allow_missing=True,
        transform=None if signed == "keep" else lambda rows: transform(rows, signed, mean),
        progress=progress,
    )
    prototypes = select(
        centers,
        weight,
        classes,
        class_minimum=class_score,
        context_maximum=context_score,
        context_minimum=context_floor,
    )
    return centers, replace(prototypes, mean=mean)
