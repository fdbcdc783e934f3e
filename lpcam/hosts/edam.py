"""EDAM: masks embedded in a classifier, and attention between pictures that share a class.

Wu et al., "Embedded Discriminative Attention Mechanism for Weakly Supervised Semantic
Segmentation", CVPR 2021. Its post-processing is a refiner, :mod:`lpcam.refiners.saliency`.
"""

import math
from typing import Annotated, Any

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import polynomial
from lpcam.models.validation import MultilabelScores
from lpcam.settings import CHECKED, Count, Rate, Share
from lpcam.storage.hashing import tensors_digest


def discriminative_masks(responses: Tensor) -> Tensor:
    """Absolute responses of a unit vector a position: its share of each channel.

    Args:
        responses: ``(B, C + 1, h, w)``, of no class first.
    """
    return F.normalize(responses, dim=1).abs()


def sinusoids(count: int, dim: int) -> Tensor:
    """Sinusoidal positions ``(count, dim)``: sine and cosine of wavelengths up to 10 000."""
    even = torch.arange(0, dim, 2, dtype=torch.float64)
    rates = torch.exp(even * (-math.log(10_000) / dim))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


class CollaborativeAttention(nn.Module):
    """Scores of one class for both pictures of a pair, from attention over both (the paper's CMA).

    Tokens are the positions of both pictures, with sinusoids of the place in their picture, row by
    row, and a learnt vector of which of the two it is.

    Args:
        dim: Channels of the tokens.
        heads: Heads of the attention.
        hidden: Width of the feed-forward layer.
        dropout: Share that is dropped of tokens and in the block.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.which = nn.Parameter(torch.empty(2, dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.block = nn.TransformerEncoderLayer(
            dim, heads, hidden, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.score = nn.Linear(dim, 1)

    def forward(self, masked: Tensor) -> Tensor:
        """Scores ``(P, 2)`` of the masked features ``(P, 2, dim, h, w)`` of P pairs."""
        tokens = masked.flatten(3).transpose(2, 3)
        places = sinusoids(tokens.shape[2], tokens.shape[3]).to(tokens)
        tokens = self.dropout(tokens + places + self.which[:, None])
        attended = self.block(tokens.flatten(1, 2)).unflatten(1, tokens.shape[1:3])
        return self.score(attended.mean(2))[..., 0]


class EDAM(Host):
    """Masks of C classes and of none, by which features are embedded before pairs attend.

    A 3x3 convolution gives each position a unit vector over the classes, of which the absolute
    values are the masks, its own maps. Embedded features times the mask of a class go through that
    class's attention over both pictures of a pair.

    A vector scores what a map would that holds it everywhere: the sum of the kernel's taps, made a
    unit vector. Its squares sum to 1, so they are taken for probabilities; the masks themselves are
    below 1, and a softmax of them could never reach what prototypes are asked for.

    Args:
        backbone: The network of local features.
        num_classes: Number of classes C.
        lr: Learning rate of backbone and attention, by SGD.
        head_lr_factor: Both convolutions learn this many times faster.
        momentum: SGD's momentum.
        weight_decay: Weight decay of all weights.
        warmup: Steps in which the rates rise from a tenth.
        poly_power: Exponent of the schedule after it.
        dim: Channels of the embedded features.
        attention_heads: Heads of the attention.
        dropout: See :class:`CollaborativeAttention`.
        freeze_backbone: Train what lies behind it alone.
    """

    batches = "pairs"
    title = "EDAM"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        backbone: Backbone,
        num_classes: Annotated[int, Field(ge=2)],
        *,
        lr: Rate = 1e-3,
        head_lr_factor: Rate = 10.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        weight_decay: Share = 5e-4,
        warmup: Annotated[int, Field(ge=0)] = 2000,
        poly_power: Annotated[float, Field(ge=0, le=10)] = 0.9,
        dim: Annotated[int, Field(ge=2, multiple_of=2)] = 128,
        attention_heads: Count = 2,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__(backbone.requires_grad_(not freeze_backbone), num_classes)
        self.save_hyperparameters(ignore=["backbone"])
        self.masks = nn.Conv2d(backbone.dim, num_classes + 1, 3, padding=1, bias=False)
        self.embedding = nn.Conv2d(backbone.dim, dim, 1)
        self.attention = nn.ModuleList(
            CollaborativeAttention(dim, attention_heads, 4 * dim, dropout)
            for _ in range(num_classes)
        )
        self.validation = MultilabelScores(num_classes)

    def forward(self, pairs: Tensor) -> Tensor:
        """Scores ``(P, 2, C)`` of pairs of pictures ``(P, 2, 3, H, W)``."""
        features = self.backbone(pairs.flatten(0, 1))
        masks = self.own_maps(features).unflatten(0, pairs.shape[:2])
        embedded = self.embedding(features).unflatten(0, pairs.shape[:2])
        masked = [embedded * mask for mask in masks.split(1, 2)]
        scores = [attend(one) for attend, one in zip(self.attention, masked, strict=True)]
        return torch.stack(scores, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of pairs ``(P, 2, 3, H, W)`` with labels ``(P, 2, C)``."""
        pairs, labels = batch
        loss = F.binary_cross_entropy_with_logits(self(pairs), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(pairs), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Scores of pictures ``(B, 3, H, W)``, each a pair with itself."""
        images, labels = batch
        self.validation.log(self, self(torch.stack([images, images], 1))[:, 0], labels)

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """The masks of the classes."""
        found = discriminative_masks(self.masks(features))[:, 1:]
        return found if classes is None else found[:, classes]

    def score(self, vectors: Tensor) -> Tensor:
        """Log of the squared masks of the classes where a map holds the vector everywhere."""
        kernel = self.masks.weight.detach().sum((2, 3)).to(vectors)
        return F.normalize(vectors @ kernel.T, dim=1).square().clamp_min(1e-12).log()[:, 1:]

    @property
    def score_key(self) -> str:
        """Hash of the convolution of the masks."""
        return tensors_digest({"masks": self.masks.weight})

    def configure_optimizers(self) -> Any:
        """SGD with a polynomial schedule by step after a warm-up."""
        hp: Any = self.hparams
        new = [*self.masks.parameters(), *self.embedding.parameters()]
        rest = [*self.attention.parameters()]
        rest += [w for w in self.backbone.parameters() if w.requires_grad]
        groups = [{"params": new, "lr": hp.lr * hp.head_lr_factor}, {"params": rest, "lr": hp.lr}]
        optimizer = torch.optim.SGD(groups, hp.lr, hp.momentum, weight_decay=hp.weight_decay)
        return polynomial(self, optimizer, hp.poly_power, warmup=hp.warmup)
