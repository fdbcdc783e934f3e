"""IRN as a refiner: its settings, and how maps are refined."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lpcam.backbones import Backbone
from lpcam.data.dataset import Picture
from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.refiners.base import TrainedRefiner
from lpcam.refiners.heads import (
    check_crop,
    load_head,
    resize,
    save_head,
    stage_channels,
    train_heads,
)
from lpcam.refiners.irn.network import RelationNetwork
from lpcam.refiners.irn.training import RelationTraining
from lpcam.refiners.labels import check_method, relation_labels
from lpcam.refiners.random_walk import random_walk
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
        make_trainer: Callable[..., pl.Trainer],
        *,
        num_workers: int,
    ) -> None:
        training = RelationTraining(backbone, radius=self.radius, lr=self.lr)
        train_heads(
            folder,
            training,
            pictures,
            partial(self._label, read_seed),
            make_trainer,
            crop=self.crop,
            stride=STRIDE,
            scales=self.scales,
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
