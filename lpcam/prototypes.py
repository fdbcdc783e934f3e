"""Prototypes: collect local features, cluster them, select what to keep.

The three steps of the paper's section 3.2 for one class after another, so that no more than one
class's features are in memory.
"""

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
from lpcam.functional import class_activation_map, normalize_maps
from lpcam.kmeans import spherical_kmeans
from lpcam.prototype_head import transform
from lpcam.prototype_set import SIDES, Prototypes


@dataclass(frozen=True)
class LocalFeatures:
    """Local features of one class on one side of the split, and where they come from.

    Attributes:
        rows: Features ``(N, D)``, half precision.
        places: For each row, index of the picture, grid row and grid column ``(N, 3)`` int32.
    """

    rows: Tensor
    places: Tensor


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


def split_features(
    read: Callable[[int], np.ndarray],
    pictures: Sequence[int],
    weight: Tensor,
    tau: float,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> tuple[LocalFeatures, LocalFeatures]:
    """Split the local features of one class's pictures by the class's own CAM.

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        pictures: Indices of the pictures that show the class.
        weight: The class's weights ``(D,)``.
        tau: Where the CAM, in 0..1, reaches it lies foreground; context elsewhere. Context includes
            other classes in the same pictures, as in the paper.
        transform: Applied to features ``(n, D)`` once they are split; nothing by default.

    Returns:
        Foreground and context.

    Raises:
        InputError: Features are infinite or NaN.
    """
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in pictures:
        local = torch.from_numpy(read(index))
        if not local.isfinite().all():
            raise InputError(
                f"features of picture {index}: not finite in half precision; "
                "check the picture and the model"
            )
        cam = class_activation_map(local.float().permute(2, 0, 1)[None], weight[None])
        foreground = normalize_maps(cam)[0, 0] >= tau
        for side, chosen in enumerate((foreground, ~foreground)):
            place = chosen.nonzero().int()
            own = local[chosen]
            rows[side].append(own if transform is None else transform(own.float()).half())
            places[side].append(F.pad(place, (1, 0), value=index))
    sides = [LocalFeatures(torch.cat(r), torch.cat(p)) for r, p in zip(rows, places, strict=True)]
    return sides[0], sides[1]


def cluster(
    features: LocalFeatures, k: int, *, seed: int, max_iter: int, nearest: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster one side of one class.

    Returns:
        Centres ``(K, D)``, counts ``(K,)`` and nearest features ``(K, nearest, 3)``, as in
        :class:`Centers`.
    """
    result = spherical_kmeans(features.rows, k, seed=seed, max_iter=max_iter)
    counts = torch.bincount(result.labels[result.labels >= 0], minlength=k)
    places = torch.full((k, nearest, 3), -1, dtype=torch.int32)
    for j in range(k):
        member = (result.labels == j).nonzero()[:, 0]
        cosine = F.cosine_similarity(features.rows[member].float(), result.centers[j][None])
        seen: set[int] = set()
        for row in features.places[member[cosine.argsort(descending=True, stable=True)]]:
            if len(seen) == nearest:
                break
            if int(row[0]) not in seen:
                places[j, len(seen)] = row
                seen.add(int(row[0]))
    return result.centers, counts, places


def fit_centers(
    read: Callable[[int], np.ndarray],
    labels: np.ndarray,
    weight: Tensor,
    classes: Sequence[str],
    *,
    k: int,
    tau: float,
    seed: int = 0,
    max_iter: int = 100,
    allow_missing: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Centers:
    """Collect and cluster, class by class (section 3.2 of the paper).

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        labels: Image labels ``(N, C)``.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        k: Clusters on each side.
        tau: Threshold of the split.
        seed: Seed of the clustering.
        max_iter: Upper bound on its iterations.
        allow_missing: Skip a class without pictures instead of failing, and make as many clusters
            as there are features where these are fewer than k.
        transform: See :func:`split_features`.
        progress: Show a bar.

    Raises:
        InputError: Unless ``allow_missing``, a class has no picture, or a side of it fewer features
            than clusters.
    """
    num_classes, dim = weight.shape
    centers = torch.zeros(num_classes, 2, k, dim)
    counts = torch.zeros(num_classes, 2, k, dtype=torch.int64)
    nearest = torch.full((num_classes, 2, k, 6, 3), -1, dtype=torch.int32)
    for c, name in enumerate(track(classes, "Clustering", disable=not progress)):
        pictures = np.flatnonzero(labels[:, c])
        if not len(pictures):
            if allow_missing:
                continue
            raise InputError(
                f"class {name!r} has no picture to learn prototypes from; "
                "add some or set prototypes.allow_missing=true"
            )
        sides = split_features(read, pictures.tolist(), weight[c], tau, transform)
        for side, features in enumerate(sides):
            n = min(k, int(features.rows.any(1).sum())) if allow_missing else k
            if allow_missing and n == 0:
                continue
            try:
                fitted = cluster(features, n, seed=seed, max_iter=max_iter)
            except InputError as error:
                raise InputError(f"prototypes of class {name!r}, {SIDES[side]}: {error}") from error
            centers[c, side, :n], counts[c, side, :n], nearest[c, side, :n] = fitted
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
) -> Prototypes:
    """Select the prototypes of every class.

    A class of which no centre passes keeps its best one, with a warning. A class may keep no
    context prototype at all; then nothing is subtracted.

    Args:
        centers: All centres.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        class_minimum: The paper's mu_f.
        context_maximum: The paper's mu_b.
        context_minimum: Drops context centres with next to no score; in the published code only.
    """
    own, context, indices = [], [], []
    for c, name in enumerate(classes):
        foreground, background = centers.centers[c]
        filled = centers.counts[c] > 0
        keep = filled[0] & select_prototypes(foreground, weight, c, minimum=class_minimum)
        if filled[0].any() and not keep.any():
            # An empty cluster's zero centre would score 1 / C.
            score = class_score(foreground, weight, c).where(filled[0], 0)
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
