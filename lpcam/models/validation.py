"""How good multi-label scores are, over an epoch."""

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score


class MultilabelScores(nn.Module):
    """Loss, mean average precision and F1 of the validation split.

    Args:
        num_classes: Number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.average_precision = MultilabelAveragePrecision(num_classes)
        self.f1 = MultilabelF1Score(num_classes)

    def log(self, module: pl.LightningModule, scores: Tensor, labels: Tensor) -> None:
        """Add a batch to what the module logs at the end of the epoch.

        Args:
            module: The module, which has this one as an attribute.
            scores: Scores ``(B, C)``.
            labels: Image labels ``(B, C)``.
        """
        self.average_precision.update(scores, labels.long())
        self.f1.update(scores, labels.long())
        loss = F.multilabel_soft_margin_loss(scores, labels)
        module.log("val/loss", loss, prog_bar=True, batch_size=len(scores), sync_dist=True)
        module.log("val/map", self.average_precision, prog_bar=True, batch_size=len(scores))
        module.log("val/f1", self.f1, prog_bar=True, batch_size=len(scores))
