"""IRN as a refiner: its settings, and how maps are refined."""

from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.functional import resize
from lpcam.models.backbones import Backbone
from lpcam.refiners.heads import Exponent, HeadRefiner, Radius
from lpcam.refiners.irn.instances import divide_maps, group_cells
from lpcam.refiners.irn.training import RelationTraining
from lpcam.refiners.labels import relation_labels
from lpcam.refiners.random_walk import random_walk
from lpcam.seeds.record import SeedRecord, grid_size
from lpcam.settings import CHECKED, Pair, Rate, Scale, Share, one_of


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


POWER = 2.0  # of the maps before the walk, unless a published setting is named
# As published.
THRESHOLDS = {
    "lpcam": Thresholds(0.45, 0.25, 0.35),
    "irn": Thresholds(0.30, 0.05, 0.25),
    "recam_voc": Thresholds(0.35, 0.10, 0.28),
    "recam_coco": Thresholds(0.35, 0.10, 0.25),
    "advcam": Thresholds(0.35, 0.15, 0.25, 1.5),
    "rib_coco": Thresholds(0.35, 0.17, 0.22, 1.3),
    "amn_voc": Thresholds(0.45, 0.15, 0.25, 1.3),
    "amn_coco": Thresholds(0.45, 0.15, 0.22, 1.3),
}


def thresholds_around(seed_background: float) -> Thresholds:
    """Thresholds for maps whose own masks are made at a background score.

    Sure foreground lies 0.12 above it and sure background 0.10 below, near the distances of the
    published values (0.15 and 0.05 for LPCAM on VOC, 0.15 and 0.10 for AMN).
    """
    sure = min(seed_background + 0.12, 0.98)
    return Thresholds(sure, max(seed_background - 0.10, 0.02), seed_background**POWER, POWER)


class IRN(HeadRefiner):
    """Maps spread up to learnt boundaries.

    Args:
        thresholds: For what is not given below, a name of :data:`THRESHOLDS`; None for
            :func:`thresholds_around` the ``seed_background``.
        conf_fg: See :class:`Thresholds`.
        conf_bg: Likewise.
        background: Likewise.
        power: Likewise.
        radius: See :class:`~lpcam.refiners.heads.HeadRefiner`; cells are of 4 pixels.
        scales: Likewise.
        lr: Learning rate of the boundary's layers; those of the displacements have ten times that.
        walk_radius: Of the walk, in cells.
        beta: See :class:`~lpcam.refiners.heads.HeadRefiner`.
        **options: See :class:`~lpcam.refiners.heads.HeadRefiner`.

    Raises:
        InputError: ``conf_bg`` is above ``conf_fg``.
    """

    cell = 4
    label_settings = ("conf_fg", "conf_bg")
    _trained: RelationTraining

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        *,
        thresholds: Annotated[str, one_of(THRESHOLDS)] | None = None,
        conf_fg: Share | None = None,
        conf_bg: Share | None = None,
        background: Share | None = None,
        power: Exponent | None = None,
        radius: Radius = 10,
        scales: Pair[Scale] = (0.5, 1.5),
        lr: Rate = 0.1,
        walk_radius: Radius = 5,
        beta: Exponent = 10,
        **options: Any,
    ) -> None:
        super().__init__(radius=radius, scales=scales, lr=lr, beta=beta, **options)
        named = THRESHOLDS[thresholds] if thresholds else thresholds_around(self.seed_background)
        self.background = named.background if background is None else background
        self._estimated = thresholds is None and background is None
        self.conf_fg = named.conf_fg if conf_fg is None else conf_fg
        self.conf_bg = named.conf_bg if conf_bg is None else conf_bg
        self.power = named.power if power is None else power
        self.walk_radius = walk_radius
        if self.conf_bg > self.conf_fg:
            raise InputError(
                f"refiner.conf_bg={self.conf_bg}: give at most refiner.conf_fg={self.conf_fg}"
            )

    @property
    def rule_of_thumb(self) -> bool:
        """Whether nothing better is known than the power of the maps' own background score."""
        return self._estimated

    def training(self, backbone: Backbone) -> RelationTraining:  # noqa: D102 - inherited
        return RelationTraining(backbone, radius=self.radius, lr=self.lr)

    def label(self, image: Image.Image, seed: SeedRecord) -> np.ndarray:  # noqa: D102 - inherited
        return relation_labels(image, seed, self.labels, conf_fg=self.conf_fg, conf_bg=self.conf_bg)

    @torch.inference_mode()
    def edge(self, image: Image.Image) -> Tensor:
        """Boundary probability of a picture on its stride-4 grid, averaged with its mirror image's.

        The mean is taken of the logits.
        """
        head, backbone = self._trained.head, self._trained.backbone
        pixels = normalize(image, backbone.mean, backbone.std)
        both = torch.stack([pixels, pixels.flip(2)]).to(head.edge_out.weight)
        grid = grid_size((image.height, image.width))
        plain, mirrored = head.edge(backbone.stages(both), grid)
        return ((plain + mirrored.flip(1)) / 2).sigmoid()

    @torch.inference_mode()
    def displacement(self, image: Image.Image) -> Tensor:
        """Displacements of a picture's stride-4 grid ``(2, h, w)``, of which differences count."""
        head, backbone = self._trained.head, self._trained.backbone
        pixels = normalize(image, backbone.mean, backbone.std).to(head.edge_out.weight)
        grid = grid_size((image.height, image.width))
        return head.displacement(backbone.stages(pixels[None]), grid)[0].cpu()

    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:  # noqa: D102 - inherited
        if not len(seed.keys):
            return seed
        return SeedRecord(seed.keys, self._walk(self._maps(seed), image), seed.size)

    def instances(
        self, image: Image.Image, seed: SeedRecord, mean: Tensor, background: float
    ) -> SeedRecord:
        """Refine the maps of one picture, those of each of its objects by themselves.

        Args:
            image: The picture.
            seed: Its maps.
            mean: Mean displacement ``(2,)`` of the training pictures.
            background: The score that a class has to exceed; groups of cells where its map does
                nowhere are left out.

        Returns:
            Scores as :meth:`refine` gives them, a map an object: a class stands among the keys as
            often as it has objects.
        """
        groups = group_cells(self.displacement(image) - mean[:, None, None])
        owners, parts = divide_maps(self._maps(seed), groups, background)
        if not owners:
            return SeedRecord(seed.keys[:0], seed.maps[:0], seed.size)
        return SeedRecord(seed.keys[owners], self._walk(parts, image), seed.size)

    def _maps(self, seed: SeedRecord) -> Tensor:
        """The maps that the walk starts from."""
        maps = torch.from_numpy(seed.maps.astype(np.float32))
        return resize(maps, grid_size(seed.size)) ** self.power

    def _walk(self, maps: Tensor, image: Image.Image) -> np.ndarray:
        """Scores in 0..1, half precision, of at least one map."""
        walked = random_walk(
            maps,
            self.edge(image).cpu(),
            radius=self.walk_radius,
            beta=self.beta,
            steps=self.steps,
        )
        # One maximum for all classes: which of them is strongest stays as it is.
        highest = walked.max()
        return (walked / highest if highest > 0 else walked).half().numpy()
