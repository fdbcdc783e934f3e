"""ReCAM: a softmax cross-entropy re-activates what the multi-label loss left out.

Chen et al., "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation", CVPR 2022.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lpcam.functional import class_activation_map, normalize_maps
from lpcam.models.backbones import Backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import Host
from lpcam.prototypes.class_head import LinearHead
from lpcam.settings import CHECKED
from lpcam.storage.hashing import digest, tensors_digest


def class_features(features: Tensor, weight: Tensor) -> Tensor:
    """What each class's map holds of a picture: the mean of its features, weighted by the map.

    Args:
        features: Local features of one picture ``(D, h, w)``.
        weight: Weights of P classes ``(P, D)``.

    Returns:
        ``(P, D)``; the map is divided by its maximum, the sum by the number of positions.
    """
    maps = normalize_maps(class_activation_map(features[None], weight))[0]
    return torch.einsum("phw,dhw->pd", maps, features) / maps[0].numel()


def single_class_loss(
    features: Sequence[Tensor], labels: Tensor, weight: Tensor, sce_weight: Tensor
) -> Tensor:
    """Softmax cross-entropy of every present class's feature, as if it were the only class (SCE).

    Args:
        features: Local features ``(D, h, w)`` of each of B pictures.
        labels: ``(B, C)`` of zeros and ones.
        weight: Class weights that make the maps ``(C, D)``.
        sce_weight: Class weights that score the features ``(C, D)``.

    Returns:
        The mean over pictures that show a class of the mean over their classes; 0 without any.
    """
    losses = []
    for found, shown in zip(features, labels, strict=True):
        present = shown.nonzero()[:, 0]
        if len(present):
            scores = class_features(found, weight[present]) @ sce_weight.T
            losses.append(F.cross_entropy(scores, present))
    return torch.stack(losses).mean() if losses else weight.sum() * 0


class ReCAM(Classifier):
    """A trained classifier that goes on with ``L = BCE + sce_weight * SCE``.

    Its own maps are those of the element-wise product of both heads' weights. With a frozen
    backbone the heads learn from local features that are computed once.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.
        sce_weight: The paper's lambda: 1 on VOC, 0.1 on COCO.
        score_weight: The weights that score the centres of LPCAM's clusters: those of the ``bce``
            head, or the ``product``, whose scores are so small that a softmax tells little apart.
        **options: See :class:`~lpcam.models.classifier.Classifier`.
    """

    title = "ReCAM"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        sce_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0,
        score_weight: Literal["bce", "product"] = "bce",
        **options: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **options)
        self.save_hyperparameters(ignore=["backbone"])
        self.sce_head = nn.Linear(backbone.dim, num_classes, bias=False)
        self.sce_weight = sce_weight
        self.score_weight = score_weight
        if self.frozen:
            self.batches = "grids"

    def begin(self, base: Host) -> None:
        """Go on from a trained classifier; the SCE head begins as it is."""
        missing = self.load_state_dict(base.state_dict(), strict=False)
        assert missing.missing_keys == ["sce_head.weight"]

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of pictures ``(B, 3, H, W)``, or of B grids of local features."""
        x, labels = batch
        features = x if self.frozen else self.backbone(x)
        scores = self.head(torch.stack([found.mean((1, 2)) for found in features]))
        bce = F.multilabel_soft_margin_loss(scores, labels)
        sce = single_class_loss(features, labels, self.head.weight, self.sce_head.weight)
        loss = bce + self.sce_weight * sce
        values = {"train/loss": loss, "train/bce": bce, "train/sce": sce}
        self.log_dict(values, batch_size=len(labels), sync_dist=True)
        return loss

    @property
    def product(self) -> Tensor:
        """Element-wise product of both heads' weights ``(C, D)``, without gradient."""
        return self.weight * self.sce_head.weight.detach()

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """CAM of the product of both heads' weights."""
        return LinearHead(self.product).own_maps(features, classes)

    def score(self, vectors: Tensor) -> Tensor:
        """Scores by the weights that ``score_weight`` names."""
        weight = self.weight if self.score_weight == "bce" else self.product
        return LinearHead(weight).score(vectors)

    @property
    def score_key(self) -> str:
        """Hash of both heads and of which of them scores."""
        heads = {"weight": self.weight, "sce": self.sce_head.weight}
        return digest([tensors_digest(heads), self.score_weight])
