"""AMN: a network that learns the labels of pixels from seeds, told which classes there are.

Lee et al., "Threshold Matters in WSSS: Manipulating the Activation for the Robust and Accurate
Segmentation Model Against Thresholds", CVPR 2022.
"""

import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from lpcam.data.dataset import IGNORED, open_image
from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host, mirrored_back
from lpcam.models.sum_head import SumHead
from lpcam.prototypes.maps import HostViews
from lpcam.settings import CHECKED, Count, Rate, Share
from lpcam.storage.hashing import digest, tensors_digest

Dilations = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(tuple)]


def balanced_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy to smoothed labels, half of it the mean over background, half over the rest.

    Args:
        logits: ``(B, n, h, w)``; channel 0 is background.
        labels: ``(B, h, w)`` int64: a channel, or 255 for none.
        smoothing: What the label's channel lacks of 1; the others share it evenly.

    Returns:
        The loss; a side without pixels counts 0.
    """
    known = labels != IGNORED
    log = logits.log_softmax(1)
    others = smoothing / (logits.shape[1] - 1)
    own = log.gather(1, labels.where(known, 0)[:, None])[:, 0]
    loss = -(others * log.sum(1) + (1 - smoothing - others) * own)
    sides = (known & (labels == 0), known & (labels > 0))
    return torch.stack([(loss * s).sum() / s.sum().clamp_min(1) for s in sides]).mean()


def unsmoothed(probabilities: Tensor, smoothing: float) -> Tensor:
    """What a network that learnt smoothed labels believes: the inverse of the smoothing.

    Smoothing makes ``(1 - smoothing - others) p + others`` of a probability p.

    Args:
        probabilities: ``(N, n)``, rows of sum 1.
        smoothing: See :func:`balanced_loss`.
    """
    others = smoothing / (probabilities.shape[1] - 1)
    return ((probabilities - others) / (1 - smoothing - others)).clamp(1e-6, 1)


def stretched(maps: Tensor, inside: Tensor, eps: float = 1e-5) -> Tensor:
    """Bring each map to 0..1 where the seeds are no background; elsewhere it stays.

    Args:
        maps: Maps of one picture ``(L, h, w)``.
        inside: Where ``(h, w)`` bool.
        eps: Added to the range that is divided by.
    """
    if not inside.any():
        return maps
    values = maps[:, inside]
    low, high = (found[:, None, None] for found in (values.amin(1), values.amax(1)))
    return torch.where(inside, (maps - low) / (high - low + eps), maps)


class AMN(Host):
    """A pixel classifier of background and C classes on features that labels condition.

    A linear layer on the picture's labels gives a factor for each channel of the features. The sum
    of four dilated 3x3 convolutions scores them. The maps are the softmax over all channels of the
    scores' mean over scales and mirror images, stretched where the picture's seeds are no
    background. So it needs the labels and the seeds of every picture.

    LPCAM is plugged in by clustering the conditioned features, split by these maps. A vector scores
    what a map would that holds it everywhere: the sum of all kernels' taps. The label smoothing is
    undone first, for it keeps every probability below what prototypes are asked for.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.
        lr: Learning rate of the backbone, by Adam, constant.
        head_lr: Learning rate of the new layers.
        dilations: Of the convolutions. Beyond the grid of a small picture they see nothing.
        weight_decay: Weight decay of all weights.
        smoothing: See :func:`balanced_loss`.
        dropout: Share of the features that are dropped in training before they are scored.
        dropout_at_inference: Drop them when maps are made too, as the published maps were, by
            mistake. A picture always loses the same ones.
        freeze_backbone: Train the new layers alone.
    """

    maps_from_features = False
    batches = "seeds"
    title = "AMN"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: Annotated[int, Field(ge=2)],
        *,
        lr: Rate = 5e-6,
        head_lr: Rate = 1e-4,
        dilations: Dilations = (6, 12, 18, 24),
        weight_decay: Share = 1e-4,
        smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.4,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        dropout_at_inference: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(backbone.requires_grad_(not freeze_backbone), num_classes)
        self.save_hyperparameters(ignore=["backbone"])
        self.condition = nn.Linear(num_classes, backbone.dim)
        self.head = SumHead(backbone.dim, num_classes + 1, dilations)
        self.smoothing = smoothing
        self.dropout = dropout
        self.dropout_at_inference = dropout_at_inference

    def local_features(self, images: Tensor, labels: Tensor) -> Tensor:
        """Local features ``(B, D, h, w)`` of pictures that show the classes of ``(B, C)``."""
        return self.backbone(images) * self.condition(labels.float())[:, :, None, None]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of pictures ``(B, 3, H, W)``, labels ``(B, C)`` and pixels' labels ``(B, H, W)``."""
        images, labels, pixels = batch
        scores = self.head(F.dropout(self.local_features(images, labels), self.dropout))
        grid = F.interpolate(pixels[:, None].float(), scores.shape[2:])[:, 0].long()
        loss = balanced_loss(scores, grid, self.smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Softmax of one view's scores, not stretched; maps of a picture need its seeds too."""
        found = self.head(features).softmax(1)[:, 1:]
        return found if classes is None else found[:, classes]

    def score(self, vectors: Tensor) -> Tensor:
        """Log probabilities of the classes where a map holds the vector everywhere."""
        scores = self.head.everywhere(vectors)
        # Among the classes alone, as every selection of prototypes compares them.
        others = self.smoothing / self.num_classes
        rest = others * (self.num_classes - 1) / (1 - others)
        return unsmoothed(scores[:, 1:].softmax(1), rest).log()

    @property
    def score_key(self) -> str:
        """Hash of the scoring layers, the seeds, and what else maps depend on."""
        dropped = self.dropout if self.dropout_at_inference else 0
        return digest(
            [tensors_digest(self.head.state_dict()), self.smoothing, dropped, self.seeds_key]
        )

    @property
    def feature_key(self) -> str:
        """Hash of the backbone and of the layer that conditions its features."""
        return digest([super().feature_key, tensors_digest(self.condition.state_dict())])

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        """Conditioned features of every scale.

        Maps are one for all scales and mirror images, so the scale of the finest grid holds them;
        those of the others are zero.
        """
        found = [self.view_features(view, batch) for view in batch["views"]]
        grids = [features.shape[-2:] for features in found]
        finest = max(range(len(grids)), key=lambda place: grids[place].numel())
        scores = []
        for features in found:
            views = [self.head(self._dropped(f, batch["ids"], v)) for v, f in enumerate(features)]
            mean = mirrored_back(torch.stack(views)).mean(0)
            scores.append(F.interpolate(mean, grids[finest], mode="bilinear", align_corners=False))
        whole = torch.stack(scores).mean(0).softmax(1)[:, 1:]
        for picture, image_id in zip(whole, batch["ids"], strict=True):
            picture.copy_(stretched(picture, self._inside(image_id, picture.shape[1:])))
        scales = []
        for place, features in enumerate(found):
            shape = (len(features), *whole.shape[:2], *grids[place])
            maps = whole.expand(shape) if place == finest else whole.new_zeros(shape)
            scales.append(HostViews(mirrored_back(features), maps))
        return scales

    def _dropped(self, features: Tensor, ids: Sequence[str], view: int) -> Tensor:
        """Features ``(B, D, h, w)`` of which some are dropped, where that is asked for."""
        if not (self.dropout and self.dropout_at_inference):
            return features
        kept = []
        for image_id in ids:
            random = torch.Generator().manual_seed(zlib.crc32(f"{view} {image_id}".encode()))
            kept.append(torch.rand(features.shape[1:], generator=random) >= self.dropout)
        return features * torch.stack(kept).to(features) / (1 - self.dropout)

    def _inside(self, image_id: str, grid: Sequence[int]) -> Tensor:
        """Where a picture's seeds are no background ``(h, w)`` bool.

        Raises:
            InputError: There are none of this picture.
        """
        if image_id not in self.seeds:
            raise InputError(
                f"classifier=amn: no seeds of picture {image_id}; it maps pictures of the data set "
                "alone, whose labels and seeds are known"
            )
        labels = torch.from_numpy(np.array(open_image(self.seeds[image_id]))).to(self.device)
        return F.interpolate(labels[None, None].float(), list(grid))[0, 0] > 0

    def configure_optimizers(self) -> Any:
        """Adam, no schedule."""
        hp: Any = self.hparams
        backbone = [w for w in self.backbone.parameters() if w.requires_grad]
        new = [*self.condition.parameters(), *self.head.parameters()]
        groups = [{"params": backbone, "lr": hp.lr}, {"params": new, "lr": hp.head_lr}]
        return torch.optim.Adam(groups, weight_decay=hp.weight_decay)
