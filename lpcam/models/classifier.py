"""The multi-label classifier, the host of the paper's main results."""

from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import polynomial
from lpcam.models.validation import MultilabelScores
from lpcam.prototypes.class_head import LinearHead
from lpcam.settings import CHECKED, Rate, Share
from lpcam.storage.hashing import tensors_digest


class Classifier(Host):
    """A backbone and one linear score a class on the mean of its local features, without bias.

    Training minimises the multi-label soft margin loss; the learning rate falls step by step as
    ``(1 - step / steps) ** poly_power``. A batch holds pictures ``(B, 3, H, W)`` or, when the
    backbone is frozen, their mean features ``(B, D)``: mean and linear layer commute with nothing
    in between, so both give the same score.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.
        optimizer: ``sgd`` or ``adamw``.
        lr: Learning rate of the backbone.
        head_lr_factor: The head learns this many times faster.
        momentum: SGD's momentum.
        weight_decay: Weight decay of all weights.
        poly_power: Exponent of the schedule.
        freeze_backbone: Train the head alone.
        freeze_stem: Keep the backbone's first convolution and its BatchNorm.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: Annotated[int, Field(ge=2)],
        *,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: Rate = 0.1,
        head_lr_factor: Rate = 10.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        weight_decay: Share = 1e-4,
        poly_power: Annotated[float, Field(ge=0, le=10)] = 0.9,
        freeze_backbone: bool = False,
        freeze_stem: bool = False,
    ) -> None:
        super().__init__(backbone.requires_grad_(not freeze_backbone), num_classes)
        self.frozen = freeze_backbone
        # Plain values only: with a module among them a checkpoint could not be read back safely.
        self.save_hyperparameters(ignore=["backbone"])
        if freeze_stem:
            for kind in (nn.Conv2d, nn.modules.batchnorm._BatchNorm):
                first = next((m for m in backbone.modules() if isinstance(m, kind)), nn.Identity())
                first.requires_grad_(False)
        self.head = nn.Linear(backbone.dim, num_classes, bias=False)
        self.validation = MultilabelScores(num_classes)

    @property
    def weight(self) -> Tensor:
        """Class weights ``(C, D)``, without gradient."""
        return self.head.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(B, C)`` of pictures ``(B, 3, H, W)`` or of mean features ``(B, D)``."""
        if x.ndim == 4:
            x = self.backbone(x).mean((2, 3))
        return self.head(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        x, labels = batch
        loss = F.multilabel_soft_margin_loss(self(x), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, mean average precision and F1 of the validation split."""
        x, labels = batch
        self.validation.log(self, self(x), labels)

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Plain CAM (Eq. 1 before its division)."""
        return LinearHead(self.weight).own_maps(features, classes)

    def score(self, vectors: Tensor) -> Tensor:
        """The head's scores, which have no bias."""
        return LinearHead(self.weight).score(vectors)

    @property
    def score_key(self) -> str:
        """Hash of the class weights."""
        return tensors_digest({"weight": self.weight})

    def configure_optimizers(self) -> Any:
        """SGD or AdamW with a polynomial schedule by step."""
        hp: Any = self.hparams
        heads = [w for name, w in self.named_parameters() if not name.startswith("backbone.")]
        groups: list[Any] = [{"params": heads, "lr": hp.lr * hp.head_lr_factor}]
        if not self.frozen:
            groups.append({"params": self.backbone.parameters(), "lr": hp.lr})
        optimizer: torch.optim.Optimizer
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, hp.lr, hp.momentum, weight_decay=hp.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, hp.lr, weight_decay=hp.weight_decay)
        return polynomial(self, optimizer, hp.poly_power)
