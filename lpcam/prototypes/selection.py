"""Selection: which centres are kept as prototypes (section 3.2 of the paper)."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from lpcam.errors import InputError
from lpcam.prototypes.centers import Centers, Clustering, fit_centers
from lpcam.prototypes.class_head import ClassHead, LinearHead
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.settings import CHECKED, Share


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
    return _passing(class_score(LinearHead(weight), centers, class_index), minimum, maximum)


def _passing(score: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    keep = torch.ones_like(score, dtype=torch.bool)
    if minimum is not None:
        keep &= score > minimum
    if maximum is not None:
        keep &= score < maximum
    return keep


def class_score(head: ClassHead, centers: Tensor, class_index: int) -> Tensor:
    """The classifier's probability of a class for each centre, ``(k,)``."""
    return head.score(centers).softmax(1)[:, class_index]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Selection:
    """Which centres are kept as prototypes, by their class score.

    Attributes:
        class_score: The paper's mu_f: class prototypes score above it.
        context_score: The paper's mu_b: context prototypes score below it.
        context_floor: And above this; None for no bound. In the published code only: it drops
            context that has next to nothing to do with the class.
        fallback: What happens to a class of which no centre passes: it keeps its ``best`` one, with
            a warning, or that is an ``error``.
    """

    class_score: Share = 0.9
    context_score: Share = 0.9
    context_floor: Share | None = None
    fallback: Literal["best", "error"] = "best"


def select(
    centers: Centers, head: ClassHead, classes: Sequence[str], settings: Selection
) -> Prototypes:
    """Select the prototypes of every class.

    A class may keep no context prototype at all; then nothing is subtracted.

    Args:
        centers: All centres.
        head: The classifier's; it scores them.
        classes: Names of the C classes.
        settings: Which are kept.

    Raises:
        InputError: No centre of a class passes and ``fallback`` is ``error``.
    """
    kept, kept_context, indices = [], [], []
    weak: list[str] = []
    for c, name in enumerate(classes):
        foreground, context = centers.centers[c]
        filled = centers.counts[c] > 0
        score = class_score(head, foreground, c)
        keep = filled[0] & _passing(score, settings.class_score, None)
        if filled[0].any() and not keep.any():
            # An empty cluster's zero centre would score 1 / C.
            score = score.where(filled[0], 0)
            if settings.fallback == "error":
                raise InputError(
                    f"class {name!r}: no prototype scores above {settings.class_score}, the best "
                    f"one {float(score.max()):.3f}; lower thresholds.class_score or set "
                    "prototypes.fallback=best"
                )
            keep[score.argmax()] = True
            weak.append(f"{name} ({float(score.max()):.3f})")
        keep_context = filled[1] & _passing(
            class_score(head, context, c), settings.context_floor, settings.context_score
        )
        kept.append(foreground[keep])
        kept_context.append(context[keep_context])
        indices.append((keep.nonzero()[:, 0].tolist(), keep_context.nonzero()[:, 0].tolist()))
    if weak:
        warnings.warn(
            f"{len(weak)} of {len(classes)} classes: no prototype scores above "
            f"{settings.class_score}, kept the best one: {', '.join(weak[:5])}"
            f"{', ...' if len(weak) > 5 else ''}",
            stacklevel=2,
        )
    return Prototypes(
        tuple(classes),
        tuple(kept),
        tuple(kept_context),
        tuple(indices),
        settings={"signed": centers.signed},
        mean=centers.mean,
    )


def fit_prototypes(
    read: Callable[[int], np.ndarray],
    labels: np.ndarray,
    head: ClassHead,
    classes: Sequence[str],
    clustering: Clustering,
    selection: Selection,
    *,
    dim: int,
    progress: bool = False,
) -> tuple[Centers, Prototypes]:
    """Collect, cluster and select with one set of settings.

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        labels: Image labels ``(N, C)``, at least one of them set.
        head: The classifier's.
        classes: Names of the C classes.
        clustering: How features are split and clustered.
        selection: Which centres are kept.
        dim: Channels D of the features.
        progress: Show a bar.

    Returns:
        All centres, and the prototypes among them.
    """
    centers = fit_centers(read, labels, head, classes, clustering, dim=dim, progress=progress)
    return centers, select(centers, head, classes, selection)
