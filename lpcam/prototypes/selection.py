"""Selection: which centres are kept as prototypes (section 3.2 of the paper)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lpcam.prototypes.centers import Centers, fit_centers
from lpcam.errors import InputError
from lpcam.prototypes.head import transform
from lpcam.prototypes.prototype_set import Prototypes


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
        read: As for :func:`~lpcam.prototypes.centers.fit_centers`, like the arguments up to ``k``.
        labels: Image labels ``(N, C)``, at least one of them set.
        weight: Class weights ``(C, D)``.
        classes: Names of the C classes.
        k: Clusters on each side, fewer where there are fewer features.
        signed: What happens to features that may be negative, see
            :func:`~lpcam.prototypes.head.transform`. The split by CAM uses them as they are; the
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
