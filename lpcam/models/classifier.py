"""The multi-label classifier, the only thing that LPCAM trains."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from lpcam.models.backbones import Backbone

from lpcam.models.weights import load_state
from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError


class Classifier(pl.LightningModule):
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

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        optimizer: str = "sgd",
        lr: float = 0.1,
        head_lr_factor: float = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        poly_power: float = 0.9,
        freeze_backbone: bool = False,
        freeze_stem: bool = False,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adamw"):
            raise InputError(f"classifier.optimizer={optimizer}: unknown; choose sgd or adamw")
        # Plain values only: with a module among them a checkpoint could not be read back safely.
        self.save_hyperparameters(ignore=["backbone"])
        self.num_classes = num_classes
        self.backbone = backbone.requires_grad_(not freeze_backbone)
        if freeze_stem:
            for kind in (nn.Conv2d, nn.modules.batchnorm._BatchNorm):
                first = next((m for m in backbone.modules() if isinstance(m, kind)), nn.Identity())
                first.requires_grad_(False)
        self.head = nn.Linear(backbone.dim, num_classes, bias=False)
        self.average_precision = MultilabelAveragePrecision(num_classes)
        self.f1 = MultilabelF1Score(num_classes)

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
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, mean average precision and F1 of the validation split."""
        x, labels = batch
        scores = self(x)
        self.average_precision.update(scores, labels.long())
        self.f1.update(scores, labels.long())
        loss = F.multilabel_soft_margin_loss(scores, labels)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(x))
        self.log("val/map", self.average_precision, prog_bar=True, batch_size=len(x))
        self.log("val/f1", self.f1, prog_bar=True, batch_size=len(x))

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[Tensor]:
        """Local features of every scale.

        Returns:
            For each scale ``(V, B, D, h, w)`` from one forward pass: the features of the pictures
            and, if the batch wants them, those of their mirror images mirrored back.
        """
        features = []
        for view in batch["views"]:
            if batch["flip"]:
                own, mirrored = self.backbone(torch.cat([view, view.flip(3)])).chunk(2)
                features.append(torch.stack([own, mirrored.flip(3)]))
            else:
                features.append(self.backbone(view)[None])
        return features

    def for_inference(self) -> "Classifier":
        """A copy that gives the same features faster, see :meth:`Backbone.fused`."""
        twin = Classifier(self.backbone.fused(), self.num_classes)
        twin.head.load_state_dict(self.head.state_dict())
        return twin.eval()

    def configure_optimizers(self) -> Any:
        """SGD or AdamW with a polynomial schedule by step."""
        hp: Any = self.hparams
        groups: list[Any] = [{"params": self.head.parameters(), "lr": hp.lr * hp.head_lr_factor}]
        if not hp.freeze_backbone:
            groups.append({"params": self.backbone.parameters(), "lr": hp.lr})
        optimizer: torch.optim.Optimizer
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, hp.lr, hp.momentum, weight_decay=hp.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, hp.lr, weight_decay=hp.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 - min(step / steps, 1)) ** hp.poly_power
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def load_classifier(path: Path, backbone: Backbone, num_classes: int) -> Classifier:
    """Load a trained classifier for inference.

    Args:
        path: A checkpoint that training wrote, or a ``.safetensors`` file of its weights.
        backbone: The backbone it was trained with; its weights are replaced.
        num_classes: Number of classes C.

    Raises:
        InputError: The file is missing, holds pickled objects, or belongs to another network or
            another number of classes.
    """
    state = load_state(path)
    found = len(state["head.weight"]) if "head.weight" in state else 0
    if found != num_classes:
        raise InputError(
            f"ckpt={path}: a classifier of {found} classes, the data set has {num_classes}; "
            "give the checkpoint that belongs to it"
        )
    classifier = Classifier(backbone, num_classes)
    try:
        classifier.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"ckpt={path}: not a classifier on {backbone.name}; choose the backbone it belongs to"
        ) from error
    return classifier.eval()
