"""From the views of a batch to maps: of any number of settings at once, over scales and mirrors."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.functional import (
    local_prototype_map,
    merge_scales,
    normalize_maps,
    propagate,
    resize,
)
from lpcam.prototypes.head import transform
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.seeds.record import grid_size

T = TypeVar("T")


class HostViews(NamedTuple):
    """What a host gives of a batch at one scale, on the grid of its features.

    Attributes:
        features: Local features of V mirrored views ``(V, B, D, h, w)``, mirrored back. LPCAM reads
            only their mean.
        maps: The host's own maps of them, not negative ``(V, B, C, h, w)``. Those of classes that a
            picture's labels do not name may be zero. None where only LPCAM's are made of it.
        extra: Whatever else the host needs to finish LPCAM's maps.
    """

    features: Tensor
    maps: Tensor | None = None
    extra: Tensor | None = None


# Turns LPCAM's rectified maps of one scale (M, B, P, h, w) into those of the host with LPCAM in it,
# given the views of that scale and the indices of the P classes.
Finish = Callable[[Tensor, HostViews, Tensor], Tensor]


@dataclass(frozen=True)
class Propagation:
    """A step between a picture's own positions, see :func:`~lpcam.functional.propagate`.

    Attributes:
        sharpness: See there.
        stage_weight: Likewise.
        own_share: Likewise.
    """

    sharpness: float
    stage_weight: float = 2.0
    own_share: float = 0.4


@dataclass(frozen=True)
class MapSetting:
    """One way of making maps: the host's own, or LPCAM with these directions.

    Attributes:
        directions: Directions ``(C, D)``; None for the host's own maps.
        offset: Added to LPCAM's signed map; 1 when there are only context prototypes, which makes
            the map ``1 - mean cosine to the context``.
        propagation: What follows on LPCAM's map; None for nothing.
        signed: What is done to features first, see :func:`~lpcam.prototypes.head.transform`.
        mean: What ``center`` subtracts ``(D,)``.
    """

    directions: Tensor | None = None
    offset: float = 0.0
    propagation: Propagation | None = None
    signed: str = "keep"
    mean: Tensor | None = None


def lpcam_setting(
    prototypes: Prototypes, use: str, propagation: Propagation | None = None
) -> MapSetting:
    """LPCAM with the prototypes of ``class``, of ``context`` or of ``both``."""
    # Without class prototypes the map is 1 - mean cosine to the context: how unlike it is.
    return MapSetting(
        prototypes.directions(use),
        1.0 if use == "context" else 0.0,
        propagation,
        prototypes.settings.get("signed", "keep"),
        prototypes.mean,
    )


def from_scale_one(scales: Sequence[T], factors: Sequence[float]) -> Sequence[T]:
    """What there is of scale 1, or of the scale next to it, and of the larger ones.

    Smaller scales blur what is where.

    Args:
        scales: Anything, for each scale.
        factors: The factor of each scale, ascending.
    """
    nearest = min(factors, key=lambda factor: abs(math.log(factor)))
    return scales[list(factors).index(nearest) :]


def spread(
    values: Tensor,
    features: Sequence[Tensor],
    stage: Tensor,
    step: Propagation,
    size: Sequence[int],
    eps: float = 1e-5,
    beside: Sequence[tuple[Tensor, Sequence[Tensor], Tensor]] = (),
) -> Tensor:
    """A picture's maps after the step, from 0 to 1 again.

    Args:
        values: Its maps ``(..., V, H, W)``.
        features: Its local features at several scales ``(..., D, h, w)``; the mean of the unit
            features counts, on the grid of the first scale.
        stage: Features of an earlier stage ``(..., E, h', w')`` at that scale.
        step: How.
        size: Rows and columns of the result.
        eps: Added to the maximum that each map is divided by, after its minimum is subtracted.
        beside: Values, features and stage of further pictures, see
            :func:`~lpcam.functional.propagate`.

    Returns:
        ``(..., V, *size)``.
    """
    first, *others = (
        (v, _mean_unit(f), s.float()) for v, f, s in ((values, features, stage), *beside)
    )
    carried = propagate(*first, beside=others, **asdict(step))
    carried = normalize_maps(carried - carried.amin((-2, -1), keepdim=True), eps)
    return resize(carried, size)


def _mean_unit(features: Sequence[Tensor]) -> Tensor:
    """Mean of unit features of several scales, on the grid of the first ``(..., D, h, w)``."""
    grid = features[0].shape[-2:]
    units = [resize(F.normalize(scale.float(), dim=-3), grid) for scale in features]
    return torch.stack(units).mean(0)


class MapMaker(nn.Module):
    """Makes maps of any number of settings from the same views.

    All directions are stacked into one matrix: M settings cost one product, not M passes. Of a
    picture and its mirror image LPCAM takes the mean features; a host's own maps are added.
    Scales are added on the stride-4 grid, and each sum is divided by its maximum.

    Args:
        settings: What to make.
        eps: Added to the maximum that an LPCAM map is divided by; a host's own has 1e-5.
        factors: The factor of each scale on the picture's size, ascending; where a setting
            propagates.
        rounded: Round the mean features to half precision first, as it is kept in the store, so
            that maps are the same whether made now or later from there.
    """

    directions: Tensor
    offsets: Tensor

    def __init__(
        self,
        settings: Sequence[MapSetting],
        *,
        eps: float = 1e-5,
        factors: Sequence[float] = (1.0,),
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.eps = eps
        self.factors = tuple(factors)
        self.rounded = rounded
        fitted = [setting for setting in settings if setting.directions is not None]
        directions = [s.directions for s in fitted if s.directions is not None]
        # Which settings do the same to features, and what.
        self._alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for row, setting in enumerate(fitted):
            mean = None if setting.mean is None else tuple(setting.mean.tolist())
            self._alike[setting.signed, mean].append(row)
        self._means = [fitted[rows[0]].mean for rows in self._alike.values()]
        stacked = torch.stack(directions) if directions else torch.zeros(0)
        # In single precision the last bits of a product, and of resizing, depend on how many maps
        # are stacked, and with them which way a value is rounded on disk: a setting would not give
        # the same file alone and in a sweep.
        self.register_buffer("directions", stacked.double(), persistent=False)
        offsets = torch.tensor([setting.offset for setting in fitted])
        self.register_buffer(
            "offsets", offsets.double()[:, None, None, None, None], persistent=False
        )

    def move(self, device: torch.device) -> "MapMaker":
        """Bring the directions to a device; to MPS, which knows no double precision, as single."""
        return self.to(device, torch.float32 if device.type == "mps" else torch.float64)

    def forward(
        self,
        scales: Sequence[HostViews],
        labels: Tensor,
        size: tuple[int, int],
        finish: Finish | None = None,
        stages: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Maps of every setting.

        Args:
            scales: The views of each scale.
            labels: Which classes to map ``(B, C)`` bool.
            size: Height and width of the pictures.
            finish: What the host does to LPCAM's maps; None for nothing.
            stages: For each picture features of an earlier stage ``(E, h', w')``, where a setting
                propagates.

        Returns:
            For each setting ``(L, H', W')`` in 0..1 on the stride-4 grid; L counts the True labels
            of the whole batch, picture by picture.
        """
        present = labels.any(0).nonzero()[:, 0]
        grid = grid_size(size)
        if not len(present):
            return [self.offsets.new_zeros(0, *grid) for _ in self.settings]
        wanted = labels[:, present]
        host: list[Tensor] = []
        fitted: list[Tensor] = []
        for views in scales:
            if views.maps is not None:
                host.append(views.maps.sum(0)[:, present][wanted].to(self.offsets.dtype))
            if len(self.offsets):
                maps = self._fitted(views.features.mean(0), present)
                fitted.append((finish(maps, views, present) if finish else maps)[:, wanted])
        made: Iterator[Tensor] = iter([])
        if fitted:
            merged = merge_scales([maps.flatten(0, 1) for maps in fitted], grid)
            whole = normalize_maps(merged, self.eps).unflatten(0, fitted[0].shape[:2])
            if stages is not None:
                whole = self._propagated(whole, scales, stages, wanted.sum(1).tolist())
            made = iter(whole)
        return [
            normalize_maps(merge_scales(host, grid)) if s.directions is None else next(made)
            for s in self.settings
        ]

    def _propagated(
        self,
        maps: Tensor,
        scales: Sequence[HostViews],
        stages: Sequence[Tensor],
        counts: Sequence[int],
    ) -> Tensor:
        """Maps ``(M, L, H, W)`` after what their settings say of propagation.

        Args:
            maps: The maps; L counts those of the pictures one after the other.
            scales: The views of each scale.
            stages: See :meth:`forward`.
            counts: Maps of each picture.
        """
        found = maps.clone()
        fitted = [s.propagation for s in self.settings if s.directions is not None]
        start = 0
        for b, (stage, count) in enumerate(zip(stages, counts, strict=True)):
            part = slice(start, start := start + count)
            if not count:
                continue
            used = [views.features[:, b].mean(0) for views in from_scale_one(scales, self.factors)]
            if self.rounded:
                used = [features.half() for features in used]
            for kind in {propagation for propagation in fitted if propagation}:
                rows = [m for m, propagation in enumerate(fitted) if propagation == kind]
                values = maps[rows, part].flatten(0, 1)
                carried = spread(values, used, stage, kind, maps.shape[2:], self.eps)
                found[rows, part] = carried.unflatten(0, (len(rows), count))
        return found

    def _fitted(self, features: Tensor, present: Tensor) -> Tensor:
        """LPCAM of one scale after ReLU, for M settings and P classes: ``(M, B, P, h, w)``."""
        if self.rounded:
            features = features.half()
        directions = self.directions[:, present]
        features = features.to(directions.dtype)
        found = features.new_empty(
            len(directions), len(features), len(present), *features.shape[2:]
        )
        for (signed, _), mean, rows in zip(
            self._alike, self._means, self._alike.values(), strict=True
        ):
            moved = transform(features.movedim(1, -1), signed, mean).movedim(-1, 1)
            maps = local_prototype_map(moved, directions[rows].flatten(0, 1))
            found[rows] = maps.unflatten(1, (len(rows), len(present))).transpose(0, 1)
        return (found + self.offsets).relu()


def sampled_maps(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """A host's maps over scales and mirror images, as the published code splits features by them.

    They are made at the picture's full size: views are added, scales are resized to sides that are
    multiples of 16, cut and added, and each map is divided by its maximum. Then one value a feature
    is read, that of the top left corner of the feature's cell (torch's ``nearest``), so no blurring
    and no other maximum enters.

    Args:
        maps: For each scale the host's own ``(V, L, h, w)``, V mirrored views of one picture. The
            first scale's grid is sampled.
        size: Height and width of the picture.

    Returns:
        Maps ``(L, h, w)`` in 0..1.
    """
    height, width = size
    grid = maps[0].shape[-2:]
    if not maps[0].shape[1]:
        return maps[0].new_zeros(0, *grid)
    added = [views.sum(0) for views in maps]
    whole = merge_scales(added, (-(-height // 16) * 16, -(-width // 16) * 16))
    return F.interpolate(normalize_maps(whole[:, :height, :width])[None], grid)[0]
