"""How a segmentation network learns, and how it labels pictures."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from lpcam.data.loaders import ViewBatch, normalized
from lpcam.models.training import polynomial
from lpcam.refiners.crf import PARAMETERS
from lpcam.segmentation.crops import Batch, seed_of
from lpcam.segmentation.loss import Grid, pyramid_loss
from lpcam.segmentation.networks import SegmentationNetwork
from lpcam.settings import CHECKED, Count, Rate, Scale, Share, Text

Side = Annotated[int, Field(ge=16, le=8192)]
Scales = tuple[Scale, ...]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Learning:
    """How a network is trained.

    Attributes:
        steps: Steps of the optimiser; a few more where rounds of equal length need them.
        save_every: Steps of a round at most, after which a checkpoint is written to go on from.
        batch_size: Crops a step.
        crop: Side of the square crops in pixels.
        crop_scales: Factors on a picture's size before the crop, each as likely.
        optimizer: ``sgd`` or ``adamw``.
        lr: Learning rate of the encoder.
        head_lr_factor: See :meth:`~lpcam.segmentation.networks.SegmentationNetwork.groups`.
        momentum: SGD's momentum.
        weight_decay: Weight decay of all but the new layers' biases.
        poly_power: Exponent of the schedule.
        lr_every: Steps for which a learning rate stays.
        pyramid: Further scales whose losses are added, see
            :func:`~lpcam.segmentation.loss.pyramid_loss`.
        loss_grid: See :func:`~lpcam.segmentation.loss.label_loss`.
        balanced: Likewise.
        pixel_weights: Whether pixels count ``alike``, or by the ``confidence`` of the maps that the
            masks were made from.
    """

    steps: Count
    save_every: Count
    batch_size: Count
    crop: Side
    crop_scales: Annotated[Scales, Field(min_length=1)]
    optimizer: Literal["sgd", "adamw"]
    lr: Rate
    head_lr_factor: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Share
    poly_power: Annotated[float, Field(ge=0, le=10)]
    lr_every: Count = 1
    pyramid: Scales = ()
    loss_grid: Grid = "picture"
    balanced: bool = False
    pixel_weights: Literal["alike", "confidence"] = "alike"

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        return math.ceil(self.steps / self.save_every)

    @property
    def round_steps(self) -> int:
        """Steps of each."""
        return math.ceil(self.steps / self.rounds)


def _known_crf(name: str) -> str:
    if name not in PARAMETERS:
        raise ValueError(f"choose from {', '.join(PARAMETERS)}")
    return name


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Testing:
    """How a trained network labels pictures.

    Attributes:
        scales: Factors on the picture's size.
        flip: Whether mirror images are among the views.
        merge: Whether a pixel gets the ``max`` of the views' scores, as published for DeepLabV2, or
            the ``mean`` of their probabilities.
        image_prior: See :func:`with_image_prior`; 0 for none, as published.
        crf: Published parameters of the dense CRF after it, a name of
            :data:`~lpcam.refiners.crf.PARAMETERS`; None for no CRF.
        test_batch_size: Pictures of one size that share a forward pass.
    """

    scales: Annotated[Scales, Field(min_length=1)]
    flip: bool
    merge: Literal["max", "mean"]
    image_prior: Annotated[float, Field(ge=0, le=10)] = 0.0
    crf: Annotated[Text, AfterValidator(_known_crf)] | None = None
    test_batch_size: Count = 1


class Segmenter(pl.LightningModule):
    """A network that labels every pixel.

    Args:
        network: The network.
        learning: How it learns; None for one that is trained already.
        testing: How it labels pictures.
        seed: Of what its layers draw in training.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        learning: Learning | None = None,
        testing: Testing | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning = learning
        self.testing = testing
        self.seed = seed

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make what a layer draws, such as dropout, depend on seed and step alone."""
        torch.manual_seed(seed_of(self.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        assert self.learning is not None
        images, labels, weights = batch
        loss = pyramid_loss(
            self.network,
            images,
            labels,
            weights,
            scales=self.learning.pyramid,
            grid=self.learning.loss_grid,
            balanced=self.learning.balanced,
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        """SGD or AdamW with a polynomial schedule by step."""
        how = self.learning
        assert how is not None
        groups = self.network.groups(how.lr, how.head_lr_factor, how.weight_decay)
        optimizer: torch.optim.Optimizer
        if how.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, how.lr, how.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, how.lr)
        return polynomial(self, optimizer, how.poly_power, every=how.lr_every)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the views of pictures on the device."""
        predicting = self.trainer.predicting
        return normalized(batch, self.network.mean, self.network.std) if predicting else batch

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> Tensor:
        """Probabilities ``(B, C + 1, H, W)`` of pictures at their own size, background first."""
        assert self.testing is not None
        return probabilities(
            self.network,
            batch["views"],
            batch["size"],
            flip=self.testing.flip,
            merge=self.testing.merge,
            image_prior=self.testing.image_prior,
        )


def probabilities(
    network: torch.nn.Module,
    views: Sequence[Tensor],
    size: tuple[int, int],
    *,
    flip: bool,
    merge: Literal["max", "mean"],
    image_prior: float = 0.0,
) -> Tensor:
    """Probabilities of background and classes, over several views.

    Args:
        network: Gives scores of pictures.
        views: For each scale, normalised pictures ``(B, 3, h, w)``.
        size: Height and width of the pictures.
        flip: Whether their mirror images are looked at too.
        merge: See :class:`Testing`.
        image_prior: Likewise.

    Returns:
        ``(B, C + 1, *size)``; each pixel's add up to 1.
    """
    merged: Tensor | None = None
    count = 0
    for view in views:
        for mirrored in (False, True)[: 1 + flip]:
            scores = network(view.flip(3) if mirrored else view).float()
            scores = scores.flip(3) if mirrored else scores
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            count += 1
            if merge == "mean":
                scores = scores.softmax(1)
                merged = scores if merged is None else merged + scores
            else:
                merged = scores if merged is None else torch.maximum(merged, scores)
    assert merged is not None
    found = merged / count if merge == "mean" else merged.softmax(1)
    return with_image_prior(found, image_prior) if image_prior else found


def with_image_prior(probabilities: Tensor, power: float) -> Tensor:
    """Let each pixel's object be of the classes that the picture as a whole shows.

    A network without labels takes the hind legs of a sheep for a cow's. Where it divides a pixel
    between classes, this leaves what background has, and divides the rest by the classes'
    probabilities times their mean over the picture to a power. So classes do not share one
    animal, and background does not win where they do.

    Args:
        probabilities: Of background and classes ``(B, C + 1, H, W)``.
        power: Of the mean.

    Returns:
        Likewise.
    """
    background, classes = probabilities.split([1, probabilities.shape[1] - 1], 1)
    mean = classes.mean((2, 3), keepdim=True)
    weighed = classes * (mean / mean.amax(1, keepdim=True).clamp_min(1e-12)) ** power
    share = weighed / weighed.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.cat([background, share * classes.sum(1, keepdim=True)], 1)
