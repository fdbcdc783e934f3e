"""From local features and fitted prototypes to maps.

The mean over prototypes collapses into one direction a class. Other aggregates do not, but the
cosines to all prototypes of all classes are still one matrix product.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.errors import InputError
from lpcam.functional import local_prototype_map
from lpcam.prototypes.prototype_set import Prototypes

TOP_K = 3
SHARPNESS = 10.0  # of log-sum-exp: towards 0 it is the mean, towards infinity the maximum
AGGREGATES = ("mean", "max", "topk", "lse")
SIGNED = ("keep", "relu", "center")


def transform(features: Tensor, signed: str, mean: Tensor | None) -> Tensor:
    """What is done to features that may be negative before they are clustered or compared.

    Args:
        features: Features ``(..., D)``.
        signed: ``keep`` them, ``relu``, or ``center``.
        mean: What ``center`` subtracts ``(D,)``; None otherwise.
    """
    if signed == "relu":
        return features.relu()
    return features if mean is None else features - mean.to(features)


class PrototypeHead(nn.Module):
    """Maps and similarities of local features under one set of prototypes.

    Args:
        prototypes: The prototypes; ``settings["signed"]``, if there, is as in :func:`transform`.

    Attributes:
        fitted: Indices of the classes that have prototypes of their own.
    """

    directions: Tensor

    def __init__(self, prototypes: Prototypes) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.fitted = [c for c, vectors in enumerate(prototypes.foreground) if len(vectors)]
        # A class without prototypes of its own has no map, so its context does not count either.
        self._context = [
            context if c in self.fitted else context[:0]
            for c, context in enumerate(prototypes.context)
        ]
        self.register_buffer("directions", prototypes.directions(), persistent=False)

    def maps(
        self, features: Tensor, classes: Tensor | None = None, aggregate: str = "mean"
    ) -> Tensor:
        """LPCAM on the features' own grid after ReLU, not normalised.

        Args:
            features: Local features ``(B, D, h, w)``.
            classes: Indices of P classes; None for all.
            aggregate: What takes the place of both means in Eq. 4 and 5: ``mean`` itself, ``max``,
                ``topk`` (mean of the three largest) or ``lse`` (log-sum-exp of 10 times the
                cosine, between mean and maximum).

        Returns:
            ``(B, P, h, w)``; zero for a class that is not fitted.

        Raises:
            InputError: The aggregate is unknown.
        """
        if aggregate not in AGGREGATES:
            raise InputError(f"aggregate={aggregate}: unknown; choose {', '.join(AGGREGATES)}")
        indices = list(range(len(self._context))) if classes is None else classes.tolist()
        features = self._transform(features)
        if aggregate == "mean":
            return local_prototype_map(features, self.directions[indices].to(features)).relu()
        groups = [self.prototypes.foreground[c] for c in indices]
        groups += [self._context[c] for c in indices]
        cosines = self._cosines(features, groups)
        foreground, context = torch.stack([_reduce(c, aggregate) for c in cosines], 1).chunk(2, 1)
        return (foreground - context).relu()

    def similarity(self, features: Tensor, name: str | int, side: str) -> Tensor:
        """Cosine of features ``(B, D, h, w)`` to the P prototypes of a class: ``(B, P, h, w)``."""
        prototypes = self.prototypes.vectors(name, side)
        return self._cosines(self._transform(features), [prototypes])[0]

    def _transform(self, features: Tensor) -> Tensor:
        signed = self.prototypes.settings.get("signed", "keep")
        return transform(features.movedim(1, -1), signed, self.prototypes.mean).movedim(-1, 1)

    def _cosines(self, features: Tensor, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """Cosines ``(B, P, h, w)`` to each group of prototypes ``(P, D)``, from one product."""
        unit = F.normalize(torch.cat(list(groups))).to(features)
        return local_prototype_map(features, unit).split([len(group) for group in groups], 1)


def _reduce(cosines: Tensor, aggregate: str) -> Tensor:
    """One map ``(B, h, w)`` from ``(B, P, h, w)``; zero without prototypes."""
    count = cosines.shape[1]
    if count == 0:
        return cosines.sum(1)
    if aggregate == "max":
        return cosines.amax(1)
    if aggregate == "topk":
        return cosines.topk(min(TOP_K, count), 1).values.mean(1)
    return ((SHARPNESS * cosines).logsumexp(1) - math.log(count)) / SHARPNESS
