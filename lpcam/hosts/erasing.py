"""OC-CSE: what an ordinary classifier still sees once a class is erased is not part of its map.

Kweon et al., "Unlocking the Potential of Ordinary Classifier: Class-Specific Adversarial Erasing
Framework for Weakly Supervised Semantic Segmentation", ICCV 2021.
"""

from typing import Annotated, Any

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lpcam.functional import class_activation_map, normalize_maps
from lpcam.models.backbones import Backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import Host
from lpcam.settings import CHECKED

Weight = Annotated[float, Field(ge=0, le=1e6)]


def draw_classes(labels: Tensor) -> Tensor:
    """One class of each picture at random ``(B,)``; of a picture without any, -1.

    Args:
        labels: ``(B, C)`` of zeros and ones.
    """
    drawn = torch.rand_like(labels).where(labels > 0, -1).max(1)
    return drawn.indices.where(drawn.values >= 0, -1)


def erase(images: Tensor, maps: Tensor) -> Tensor:
    """Fade pictures to the mean colour where their maps are strong: ``x (1 - map)``.

    Args:
        images: Normalised pictures ``(B, 3, H, W)``; 0 is the mean colour.
        maps: Maps in 0..1 ``(B, h, w)``.
    """
    whole = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)
    return images * (1 - whole)


class Erasing(Classifier):
    """A classifier whose map of a class must leave nothing of it for an ordinary classifier.

    Each step erases one present class of each picture by the network's own map. The loss is the
    classification loss plus ``(erasing + erasing_growth * epoch)`` times that of the ordinary
    classifier on the erased picture, where the labels lack the erased class. That one is frozen;
    the gradient passes through it into the map. Both begin with the same weights.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.
        erasing: Weight of the second loss in the first epoch.
        erasing_growth: What is added to it with each epoch.
        **options: See :class:`~lpcam.models.classifier.Classifier`.
    """

    title = "OC-CSE"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        erasing: Weight = 0.3,
        erasing_growth: Weight = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **options)
        self.save_hyperparameters(ignore=["backbone"])
        self.erasing = erasing
        self.erasing_growth = erasing_growth
        # Training reads pictures even where only the head is trained: they are erased by its maps.
        self.frozen = False
        # In a tuple, for it is no part of this network: neither trained nor saved with it.
        self._ordinary: tuple[Host, ...] = ()

    def begin(self, base: Host) -> None:
        """Erase against a trained classifier, and go on from its weights."""
        self.load_state_dict(base.state_dict())
        self._ordinary = (base.eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        """Bring the ordinary classifier to where the pictures will be."""
        self._ordinary[0].to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        features = self.backbone(images)
        loss = F.multilabel_soft_margin_loss(self.head(features.mean((2, 3))), labels)
        drawn = draw_classes(labels)
        shown = drawn >= 0
        if shown.any():
            maps = normalize_maps(class_activation_map(features[shown], self.head.weight))
            erased = erase(images[shown], maps[torch.arange(len(maps)), drawn[shown]])
            rest = labels[shown] * (1 - F.one_hot(drawn[shown], self.num_classes))
            left = F.multilabel_soft_margin_loss(self._ordinary[0](erased), rest)
            loss = loss + (self.erasing + self.erasing_growth * self.current_epoch) * left
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss
