"""PSA: maps spread by a random walk along affinities that a network learns from the maps.

Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
Supervised Semantic Segmentation", CVPR 2018. The published AffinityNet is trained whole; here its
layers stand on the frozen backbone, and colours are not jittered.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.functional import resize
from lpcam.models.backbones import Backbone
from lpcam.refiners.crf import equal_power
from lpcam.refiners.heads import (
    Exponent,
    HeadRefiner,
    HeadTraining,
    Radius,
    Steps,
    stage_channels,
)
from lpcam.refiners.labels import affinity_labels, background_score, cell_means
from lpcam.refiners.pairs import affinity_loss, pair_labels
from lpcam.refiners.random_walk import at_offset, pair_offsets, propagate
from lpcam.seeds.record import SeedRecord, grid_size
from lpcam.settings import CHECKED, Rate, one_of

WIDTHS = (64, 128, 256)


class Powers(NamedTuple):
    """The values that are tuned for a kind of maps: powers p of ``(1 - strongest map) ** p``.

    A class equals that background where its map is x with ``x = (1 - x) ** p``.

    Attributes:
        low: For the labels' sure foreground.
        high: For their sure background, the larger one.
        power: For the background that walks.
    """

    low: float
    high: float
    power: float


# As published.
POWERS = {"psa": Powers(4, 32, 16)}


def powers_around(seed_background: float) -> Powers:
    """Powers for maps whose own masks are made at a background score.

    The background equals a map 0.12 above that score, 0.10 below it, and at it.
    """
    low, high, walk = (equal_power(seed_background + step) for step in (0.12, -0.10, 0))
    return Powers(low, high, walk)


class AffinityNetwork(nn.Module):
    """Features whose distance tells whether two cells belong together.

    Args:
        channels: Channels of the backbone's stages; the three deepest are used.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        branches = [
            nn.Conv2d(size, width, 1, bias=False)
            for size, width in zip(channels[-3:], WIDTHS, strict=True)
        ]
        self.branches = nn.ModuleList(branches)
        self.merge = nn.Conv2d(sum(WIDTHS), sum(WIDTHS), 1, bias=False)
        for branch in branches:
            nn.init.kaiming_normal_(branch.weight)
        nn.init.xavier_uniform_(self.merge.weight, gain=4)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Features ``(B, 448, *grid)`` of the backbone's stages on the stride-8 grid."""
        found = [
            F.elu(branch(resize(stage, grid)))
            for branch, stage in zip(self.branches, features[-3:], strict=True)
        ]
        return F.elu(self.merge(torch.cat(found, 1)))


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """``exp(-mean |f_i - f_j|)`` of every pair (PSA, Eq. 3, with the mean over channels).

    Args:
        features: ``(B, D, h, w)``.
        radius: The radius of the pairs.

    Returns:
        ``(B, O, h', w')`` as :func:`~lpcam.refiners.random_walk.edge_affinity`.
    """
    first = at_offset(features, (0, 0), radius)
    distances = [
        (first - at_offset(features, offset, radius)).abs().mean(1)
        for offset in pair_offsets(radius)
    ]
    return (-torch.stack(distances, 1)).exp()


class AffinityTraining(HeadTraining):
    """Learns affinities.

    Args:
        backbone: The backbone.
        radius: Of the pairs, in cells of the stride-8 grid.
        lr: Learning rate.
        weight_decay: Weight decay.
    """

    head: AffinityNetwork

    def __init__(
        self, backbone: Backbone, *, radius: int, lr: float, weight_decay: float = 5e-4
    ) -> None:
        head = AffinityNetwork(stage_channels(backbone))
        groups = [(list(head.parameters()), lr)]
        super().__init__(backbone, head, groups, weight_decay=weight_decay)
        self.radius = radius

    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of the affinities."""
        found = self.head(features, (labels.shape[1], labels.shape[2]))
        return affinity_loss(feature_affinity(found, self.radius), pair_labels(labels, self.radius))


class PSA(HeadRefiner):
    """Maps spread along learnt affinities.

    The background walks too, from ``(1 - strongest map) ** power``. A class scores its share of
    itself and the background, so a ``background`` of 0.5 gives the strongest of all, as published.

    Args:
        powers: For what is not given below, a name of :data:`POWERS`; None for
            :func:`powers_around` the ``seed_background``.
        low: See :class:`Powers`.
        high: Likewise.
        power: Likewise.
        radius: See :class:`~lpcam.refiners.heads.HeadRefiner`; cells are of 8 pixels.
        lr: Likewise.
        beta: Likewise.
        steps: Likewise.
        **options: Likewise.

    Raises:
        InputError: ``low`` is above ``high``.
    """

    cell = 8
    label_settings = ("low", "high")
    _trained: AffinityTraining

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        *,
        powers: Annotated[str, one_of(POWERS)] | None = None,
        low: Exponent | None = None,
        high: Exponent | None = None,
        power: Exponent | None = None,
        radius: Radius = 5,
        lr: Rate = 1.0,
        beta: Exponent = 8,
        steps: Steps = 32,
        **options: Any,
    ) -> None:
        super().__init__(radius=radius, lr=lr, beta=beta, steps=steps, **options)
        named = POWERS[powers] if powers else powers_around(self.seed_background)
        self.low = named.low if low is None else low
        self.high = named.high if high is None else high
        self.power = named.power if power is None else power
        if self.low > self.high:
            raise InputError(f"refiner.low={self.low}: give at most refiner.high={self.high}")

    @property
    def mask_background(self) -> float:
        """A class wins where it scores more than the background that walked."""
        return 0.5

    def training(self, backbone: Backbone) -> AffinityTraining:  # noqa: D102 - inherited
        return AffinityTraining(backbone, radius=self.radius, lr=self.lr)

    def label(self, image: Image.Image, seed: SeedRecord) -> np.ndarray:  # noqa: D102 - inherited
        return affinity_labels(
            image, seed, self.labels, low=self.low, high=self.high, stride=self.cell
        )

    @torch.inference_mode()
    def affinity(self, image: Image.Image) -> Tensor:
        """Affinity ``(O, h, w)`` of each cell of the stride-8 grid to its neighbours."""
        head, backbone = self._trained.head, self._trained.backbone
        pixels = normalize(image, backbone.mean, backbone.std)[None]
        stages = backbone.stages(pixels.to(head.merge.weight))
        grid = -(-image.height // self.cell), -(-image.width // self.cell)
        margin = self.radius - 1
        # What is padded pairs with cells outside the grid only, which the walk leaves out.
        padded = F.pad(head(stages, grid), (margin, margin, 0, margin))
        return feature_affinity(padded, self.radius)[0]

    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:  # noqa: D102 - inherited
        if not len(seed.keys):
            return seed
        maps = seed.full_size()
        scores = cell_means(torch.cat([background_score(maps, self.power), maps]), self.cell)
        walked = propagate(
            scores, self.affinity(image).cpu(), radius=self.radius, beta=self.beta, steps=self.steps
        )
        walked = resize(walked, grid_size(seed.size)).clamp_min(0)
        background, classes = walked[:1], walked[1:]
        shares = classes / (background + classes).clamp_min(1e-12)
        return SeedRecord(seed.keys, shares.half().numpy(), seed.size)
