"""PSA: maps spread by a random walk along affinities that a network learns from the maps.

Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
Supervised Semantic Segmentation", CVPR 2018. The published AffinityNet is trained whole; here its
layers stand on the frozen backbone, and colours are not jittered.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lpcam.backbones import Backbone
from lpcam.data.dataset import Picture
from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.refiners.base import TrainedRefiner
from lpcam.refiners.heads import (
    HeadTraining,
    check_crop,
    load_head,
    resize,
    save_head,
    stage_channels,
    train_heads,
)
from lpcam.refiners.labels import affinity_labels, background_score, cell_means, check_method
from lpcam.refiners.pairs import affinity_loss, pair_labels
from lpcam.refiners.random_walk import at_offset, pair_offsets, propagate
from lpcam.seeds import Seed, grid_size

# Pixels between the cells whose affinities are learnt.
STRIDE = 8
WIDTHS = (64, 128, 256)


class AffinityNetwork(nn.Module):
    """Features whose distance tells whether two cells belong together.

    Args:
        channels: Channels of the backbone's stages; the three deepest are used.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        branches = [
            nn.Conv2d(own, width, 1, bias=False)
            for own, width in zip(channels[-3:], WIDTHS, strict=True)
        ]
        self.branches = nn.ModuleList(branches)
        self.merge = nn.Conv2d(sum(WIDTHS), sum(WIDTHS), 1, bias=False)
        for branch in branches:
            nn.init.kaiming_normal_(branch.weight)
        nn.init.xavier_uniform_(self.merge.weight, gain=4)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Features ``(B, 448, *grid)`` of the backbone's stages on the stride-8 grid."""
        found = [
            F.elu(branch(resize(own, grid)))
            for branch, own in zip(self.branches, features[-3:], strict=True)
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


class PSA(TrainedRefiner):
    """Maps spread along learnt affinities.

    The background walks too, from ``(1 - strongest map) ** power``. A class scores its share of
    itself and the background, so a ``background`` of 0.5 gives the strongest of all, as published.

    A power p makes class and background even where a map is x with ``x = (1 - x) ** p``.

    Args:
        low: The power of the labels' sure foreground.
        high: The power of their sure background, the larger one.
        power: The power of the background that walks.
        labels: What refines the labels, ``par`` or ``crf``.
        radius: Of the pairs, in cells of the stride-8 grid.
        crop: Side of the training crops in pixels, a multiple of 8.
        epochs: Passes over the training pictures.
        batch_size: Crops a step.
        lr: Learning rate.
        beta: Power of the affinities in the walk.
        steps: Steps of the walk.
        **options: See :class:`~lpcam.refiners.base.Refiner`.

    Raises:
        InputError: A setting is outside its range.
    """

    def __init__(
        self,
        *,
        low: float = 0.3,
        high: float = 1.0,
        power: float = 0.4,
        labels: str = "par",
        radius: int = 5,
        crop: int = 256,
        epochs: int = 4,
        batch_size: int = 8,
        lr: float = 1.0,
        beta: float = 8,
        steps: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < low <= high:
            raise InputError(
                f"refiner.low={low} and refiner.high={high}: give two powers above 0, the first "
                "not above the second"
            )
        check_crop(crop, STRIDE, radius)
        self.low = low
        self.high = high
        self.power = power
        self.labels = labels
        self.radius = radius
        self.crop = crop
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.beta = beta
        self.steps = steps

    def training_inputs(self) -> Mapping[str, Any]:  # noqa: D102 - inherited
        check_method(self.labels)  # before a training that would find out late
        names = ("low", "high", "labels", "radius", "crop", "epochs", "batch_size", "lr")
        return {"refiner": "PSA", **{name: getattr(self, name) for name in names}}

    def fit(  # noqa: D102 - inherited
        self,
        folder: Path,
        pictures: Sequence[Picture],
        read_seed: Callable[[Picture], Seed],
        backbone: Backbone,
        make_trainer: Callable[..., pl.Trainer],
        *,
        num_workers: int,
    ) -> None:
        training = AffinityTraining(backbone, radius=self.radius, lr=self.lr)
        train_heads(
            folder,
            training,
            pictures,
            partial(self._label, read_seed),
            make_trainer,
            crop=self.crop,
            stride=STRIDE,
            epochs=self.epochs,
            batch_size=self.batch_size,
            num_workers=num_workers,
        )
        save_head(folder, training.head)

    def _label(
        self, read_seed: Callable[[Picture], Seed], picture: Picture, image: Image.Image
    ) -> np.ndarray:
        return affinity_labels(
            image, read_seed(picture), self.labels, low=self.low, high=self.high, stride=STRIDE
        )

    def load(self, folder: Path, backbone: Backbone, device: str) -> None:  # noqa: D102 - inherited
        head = AffinityNetwork(stage_channels(backbone))
        load_head(folder, head)
        self._head = head.eval().to(device)
        self._backbone = backbone.fused().to(device)

    @torch.inference_mode()
    def affinity(self, image: Image.Image) -> Tensor:
        """Affinity ``(O, h, w)`` of each cell of the stride-8 grid to its neighbours."""
        pixels = normalize(image, self._backbone.mean, self._backbone.std)[None]
        stages = self._backbone.stages(pixels.to(self._head.merge.weight))
        grid = -(-image.height // STRIDE), -(-image.width // STRIDE)
        margin = self.radius - 1
        # What is padded pairs with cells outside the grid only, which the walk leaves out.
        padded = F.pad(self._head(stages, grid), (margin, margin, 0, margin))
        return feature_affinity(padded, self.radius)[0]

    def refine(self, image_id: str, image: Image.Image, seed: Seed) -> Seed:  # noqa: D102 - inherited
        if not len(seed.keys):
            return seed
        maps = seed.full_size()
        scores = cell_means(torch.cat([background_score(maps, self.power), maps]), STRIDE)
        walked = propagate(
            scores, self.affinity(image).cpu(), radius=self.radius, beta=self.beta, steps=self.steps
        )
        walked = resize(walked[None], grid_size(seed.size))[0].clamp_min(0)
        background, classes = walked[:1], walked[1:]
        shares = classes / (background + classes).clamp_min(1e-12)
        return Seed(seed.keys, shares.half().numpy(), seed.size)
