"""IRN: maps spread by a random walk up to boundaries that a network learns from the maps.

Ahn et al., "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR
2019. The network also learns displacements towards the centres of objects, which separate
instances; the pseudo masks of classes need the boundaries alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from lpcam.backbones import Backbone
from lpcam.data.dataset import Picture, open_picture
from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.refiners.base import TrainedRefiner
from lpcam.refiners.heads import (
    HeadTraining,
    LabelledCrops,
    check_crop,
    load_head,
    resize,
    save_head,
    stage_channels,
    train_heads,
)
from lpcam.refiners.labels import check_method, relation_labels
from lpcam.refiners.pairs import PairLabels, affinity_loss, mean_where, pair_labels
from lpcam.refiners.random_walk import at_offset, edge_affinity, pair_offsets, random_walk
from lpcam.seeds import Seed, grid_size

# Pixels between the cells of the boundary map.
STRIDE = 4


class Thresholds(NamedTuple):
    """The values that are tuned for a kind of maps.

    Attributes:
        conf_fg: Background score of the labels' sure foreground.
        conf_bg: Background score of their sure background.
        background: Background score of the pseudo masks.
        power: Power of the maps before the walk.
    """

    conf_fg: float
    conf_bg: float
    background: float
    power: float = 1.0


# As published; the first is for the embedded data with EfficientNet, whose LPCAM maps are best at
# a background score of 0.6.
THRESHOLDS = {
    "cutouts": Thresholds(0.72, 0.5, 0.4, 2.0),
    "lpcam": Thresholds(0.45, 0.25, 0.35),
    "irn": Thresholds(0.30, 0.05, 0.25),
    "recam_voc": Thresholds(0.35, 0.10, 0.28),
    "recam_coco": Thresholds(0.35, 0.10, 0.25),
    "advcam": Thresholds(0.35, 0.15, 0.25, 1.5),
    "rib_coco": Thresholds(0.35, 0.17, 0.22, 1.3),
    "amn_voc": Thresholds(0.45, 0.15, 0.25, 1.3),
    "amn_coco": Thresholds(0.45, 0.15, 0.22, 1.3),
}


class RelationNetwork(nn.Module):
    """Boundaries and displacements from the stages of a backbone.

    Normalisation is by groups of channels in one picture, so a picture's result does not depend on
    its batch.

    Args:
        channels: Channels of each stage, the finest first; at least three.
    """

    mean_shift: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.edge_branches = nn.ModuleList(_branch(own, 32, 4) for own in channels)
        self.edge_out = nn.Conv2d(32 * len(channels), 1, 1)
        shallow, deep = channels[:2], channels[2:]
        self.shallow = nn.ModuleList(
            _branch(own, width, width // 8) for own, width in zip(shallow, (64, 128), strict=True)
        )
        self.deep = nn.ModuleList(_branch(own, 256, 16) for own in deep)
        self.merge_deep = _branch(256 * len(deep), 256, 16)
        self.merge = _branch(256 + 64 + 128, 256, 16)
        self.displacement_out = nn.Conv2d(256, 2, 1, bias=False)
        self.register_buffer("mean_shift", torch.zeros(2))

    def edge(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Boundary logits.

        Args:
            features: The stages ``(B, D_i, h_i, w_i)``.
            grid: The stride-4 grid.

        Returns:
            ``(B, *grid)``.
        """
        found = [
            resize(branch(own), grid).relu()
            for branch, own in zip(self.edge_branches, _fit(features, grid), strict=True)
        ]
        return self.edge_out(torch.cat(found, 1))[:, 0]

    def displacement(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Displacements ``(B, 2, *grid)`` (rows, columns) to a common point of each object.

        In evaluation their mean over the training pictures is subtracted, since training fixes only
        the differences.
        """
        half = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        features = _fit(features, grid)
        deep = [resize(b(own), half).relu() for b, own in zip(self.deep, features[2:], strict=True)]
        merged = resize(self.merge_deep(torch.cat(deep, 1)), grid).relu()
        shallow = [
            resize(branch(own), grid).relu()
            for branch, own in zip(self.shallow, features[:2], strict=True)
        ]
        found = self.displacement_out(self.merge(torch.cat([*shallow, merged], 1)).relu())
        return found if self.training else found - self.mean_shift[:, None, None]


def _branch(channels: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(groups, width))


def _fit(features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Bring stages that are finer than the grid to it before anything is computed from them."""
    return [resize(f, grid) if f.shape[2] > grid[0] else f for f in features]


def displacement_loss(displacement: Tensor, pairs: PairLabels, radius: int) -> Tensor:
    """How far differences of displacements are from what they should be (IRN, Eq. 8 and 9).

    Two cells of one object point to the same place, so theirs differ by the way from one to the
    other; two cells of background have the same.

    Args:
        displacement: ``(B, 2, h, w)``.
        pairs: What is known of the pairs.
        radius: Their radius.

    Returns:
        Mean absolute error over the foreground pairs, plus that over the background pairs.
    """
    offsets = pair_offsets(radius)
    first = at_offset(displacement, (0, 0), radius)
    difference = torch.stack([first - at_offset(displacement, o, radius) for o in offsets], 2)
    wanted = torch.tensor(offsets).to(difference).T[:, :, None, None]
    foreground = (difference - wanted).abs().mean(1)
    background = difference.abs().mean(1)
    return mean_where(foreground, pairs.foreground) + mean_where(background, pairs.background)


class RelationTraining(HeadTraining):
    """Learns boundaries and displacements.

    Args:
        backbone: The backbone.
        radius: Of the pairs, in cells of the stride-4 grid.
        lr: Learning rate of the boundary's layers; those of the displacements have ten times that.
        weight_decay: Weight decay.
    """

    head: RelationNetwork

    def __init__(
        self, backbone: Backbone, *, radius: int, lr: float, weight_decay: float = 1e-4
    ) -> None:
        head = RelationNetwork(stage_channels(backbone))
        edge = [*head.edge_branches.parameters(), *head.edge_out.parameters()]
        ids = {id(parameter) for parameter in edge}
        others = [parameter for parameter in head.parameters() if id(parameter) not in ids]
        groups = [(edge, lr), (others, 10 * lr)]
        super().__init__(backbone, head, groups, weight_decay=weight_decay)
        self.radius = radius

    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of the affinities plus half that of the displacements."""
        grid = (labels.shape[1], labels.shape[2])
        pairs = pair_labels(labels, self.radius)
        affinity = edge_affinity(self.head.edge(features, grid).sigmoid(), self.radius)
        displacement = self.head.displacement(features, grid)
        apart = displacement_loss(displacement, pairs, self.radius)
        return affinity_loss(affinity, pairs) + apart / 2

    @torch.no_grad()
    def find_mean_shift(self, pictures: Sequence[Picture]) -> None:
        """Store the mean displacement over pictures, each counting the same."""
        self.eval()
        self.head.mean_shift.zero_()
        total = torch.zeros_like(self.head.mean_shift)
        for picture in pictures:
            image = open_picture(picture.path)
            pixels = normalize(image, self.backbone.mean, self.backbone.std)[None].to(total)
            grid = grid_size((image.height, image.width))
            found = self.head.displacement(self.backbone.stages(pixels), grid)
            total += found.mean((0, 2, 3))
        self.head.mean_shift.copy_(total / max(len(pictures), 1))


class IRN(TrainedRefiner):
    """Maps spread up to learnt boundaries.

    Args:
        thresholds: A name of :data:`THRESHOLDS`, for what is not given below.
        conf_fg: See :class:`Thresholds`.
        conf_bg: Likewise.
        background: Likewise.
        power: Likewise.
        labels: What refines the labels, ``par`` or ``crf``.
        radius: Of the pairs in training, in cells of the stride-4 grid.
        crop: Side of the training crops in pixels, a multiple of 4.
        scales: Range of the factor on a picture's size in training.
        epochs: Passes over the training pictures.
        batch_size: Crops a step.
        lr: See :class:`RelationTraining`.
        walk_radius: Of the walk, in the same cells.
        beta: Power of the affinities in the walk.
        steps: Steps of the walk.
        **options: See :class:`~lpcam.refiners.base.Refiner`.

    Raises:
        InputError: A setting is outside its range.
    """

    def __init__(
        self,
        *,
        thresholds: str = "cutouts",
        conf_fg: float | None = None,
        conf_bg: float | None = None,
        background: float | None = None,
        power: float | None = None,
        labels: str = "par",
        radius: int = 10,
        crop: int = 256,
        scales: Sequence[float] = (0.5, 1.5),
        epochs: int = 4,
        batch_size: int = 8,
        lr: float = 0.1,
        walk_radius: int = 5,
        beta: float = 10,
        steps: int = 256,
        **options: Any,
    ) -> None:
        if thresholds not in THRESHOLDS:
            names = ", ".join(THRESHOLDS)
            raise InputError(f"refiner.thresholds={thresholds}: unknown; choose among {names}")
        named = THRESHOLDS[thresholds]
        super().__init__(
            background=named.background if background is None else background, **options
        )
        self.conf_fg = named.conf_fg if conf_fg is None else conf_fg
        self.conf_bg = named.conf_bg if conf_bg is None else conf_bg
        self.power = named.power if power is None else power
        if not 0 <= self.conf_bg <= self.conf_fg <= 1:
            raise InputError(
                f"refiner.conf_bg={self.conf_bg} and refiner.conf_fg={self.conf_fg}: give two "
                "scores in 0..1, the first not above the second"
            )
        check_crop(crop, STRIDE, radius)
        self.labels = labels
        self.radius = radius
        self.crop = crop
        self.scales = list(scales)
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.walk_radius = walk_radius
        self.beta = beta
        self.steps = steps

    def training_inputs(self) -> Mapping[str, Any]:  # noqa: D102 - inherited
        check_method(self.labels)  # before a training that would find out late
        names = ("conf_fg", "conf_bg", "labels", "radius", "crop", "scales", "epochs",
                 "batch_size", "lr")  # fmt: skip
        return {"refiner": "IRN", **{name: getattr(self, name) for name in names}}

    def fit(  # noqa: D102 - inherited
        self,
        folder: Path,
        pictures: Sequence[Picture],
        read_seed: Callable[[Picture], Seed],
        backbone: Backbone,
        num_classes: int,
        make_trainer: Callable[..., pl.Trainer],
        *,
        num_workers: int,
    ) -> None:
        label_folder = folder / "labels"
        label_folder.mkdir(exist_ok=True)
        crops = LabelledCrops(
            pictures,
            label_folder,
            partial(self._label, read_seed),
            mean=backbone.mean,
            std=backbone.std,
            crop=self.crop,
            stride=STRIDE,
            scales=(self.scales[0], self.scales[1]),
        )
        training = RelationTraining(backbone, radius=self.radius, lr=self.lr)
        train_heads(
            folder,
            training,
            crops,
            make_trainer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            num_workers=num_workers,
        )
        training.find_mean_shift(pictures)
        save_head(folder, training.head)

    def _label(
        self, read_seed: Callable[[Picture], Seed], picture: Picture, image: Image.Image
    ) -> np.ndarray:
        return relation_labels(
            image, read_seed(picture), self.labels, conf_fg=self.conf_fg, conf_bg=self.conf_bg
        )

    def load(self, folder: Path, backbone: Backbone, device: str) -> None:  # noqa: D102 - inherited
        head = RelationNetwork(stage_channels(backbone))
        load_head(folder, head)
        self._head = head.eval().to(device)
        self._backbone = backbone.fused().to(device)

    @torch.inference_mode()
    def edge(self, image: Image.Image) -> Tensor:
        """Boundary probability of a picture on its stride-4 grid, averaged with its mirror image's.

        The mean is taken of the logits.
        """
        pixels = normalize(image, self._backbone.mean, self._backbone.std)
        both = torch.stack([pixels, pixels.flip(2)]).to(self._head.mean_shift)
        grid = grid_size((image.height, image.width))
        own, mirrored = self._head.edge(self._backbone.stages(both), grid)
        return ((own + mirrored.flip(1)) / 2).sigmoid()

    def refine(self, image_id: str, image: Image.Image, seed: Seed) -> Seed:  # noqa: D102 - inherited
        if not len(seed.keys):
            return seed
        maps = torch.from_numpy(seed.maps.astype(np.float32))
        maps = resize(maps[None], grid_size(seed.size))[0] ** self.power
        walked = random_walk(
            maps,
            self.edge(image).cpu(),
            radius=self.walk_radius,
            beta=self.beta,
            steps=self.steps,
        )
        # One maximum for all classes: which of them is strongest stays as it is.
        highest = walked.max()
        scores = walked / highest if highest > 0 else walked
        return Seed(seed.keys, scores.half().numpy(), seed.size)
