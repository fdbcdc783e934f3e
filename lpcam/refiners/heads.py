"""Refiners that learn layers of their own on the features of a frozen backbone.

Both see the same data: pictures, and label images made from their maps when a
picture is first asked for, by as many processes as load pictures. A killed run finds them again.
"""

import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
import pytorch_lightning as pl
import torch
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lpcam.data.crops import RandomCrop, by_factor
from lpcam.data.dataset import Picture, open_image, open_picture
from lpcam.data.loaders import decoders
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone
from lpcam.models.training import MakeTrainer, fit, per_process, polynomial
from lpcam.refiners.base import TrainedRefiner
from lpcam.refiners.crf import check_backend
from lpcam.refiners.labels import Method
from lpcam.seeds.palette import save_mask
from lpcam.seeds.record import SeedRecord
from lpcam.settings import CHECKED, Count, Pair, Rate, Scale
from lpcam.storage.files import write_atomically
from lpcam.storage.ranks import is_main_process

WEIGHTS = "heads.safetensors"
CHECKPOINT = "checkpoint"
Exponent = Annotated[float, Field(gt=0, le=1000)]
Radius = Annotated[int, Field(ge=2, le=50)]  # the number of pairs grows with its square
Steps = Annotated[int, Field(ge=1, le=10_000)]


class LabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Crops of pictures and of their labels.

    Args:
        pictures: The pictures.
        folder: Where label images ``<id>.png`` lie, or are written when first needed.
        make_label: Makes the labels ``(H, W)`` uint8 of a picture: 0 background, class index + 1,
            255 ignored.
        crop: What cuts them out, at multiples of the labels' stride.
        stride: Pixels between labels.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        folder: Path,
        make_label: Callable[[Picture, Image.Image], np.ndarray],
        crop: RandomCrop,
        stride: int,
    ) -> None:
        self.pictures = pictures
        self.folder = folder
        self.make_label = make_label
        self.crop = crop
        self.stride = stride

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A picture ``(3, crop, crop)`` and labels of a ``stride``-th the side, int64."""
        picture = self.pictures[index]
        image = open_picture(picture.path)
        pixels, labels = self.crop.both(image, self._label(picture, image))
        # Cells are represented by their middle.
        middle = slice(self.stride // 2, None, self.stride)
        return pixels, labels[middle, middle].contiguous()

    def _label(self, picture: Picture, image: Image.Image) -> Image.Image:
        path = self.folder / f"{picture.id}.png"
        if not path.is_file():
            save_mask(path, self.make_label(picture, image))
        return open_image(path)


class HeadTraining(pl.LightningModule):
    """Trains layers on the stages of a frozen backbone by SGD with a polynomial schedule.

    There is no momentum: the published programs hand their weight decay over in its place, so they
    have none to speak of, and their learning rates are made for that.

    Args:
        backbone: The backbone. It is copied.
        head: The layers.
        groups: Their parameters with a learning rate each.
        weight_decay: Weight decay.
        poly_power: Exponent of the schedule.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        *,
        weight_decay: float,
        poly_power: float = 0.9,
    ) -> None:
        super().__init__()
        self.backbone = backbone.fused().requires_grad_(False)
        self.head = head
        self.groups = [{"params": list(parameters), "lr": lr} for parameters, lr in groups]
        self.weight_decay = weight_decay
        self.poly_power = poly_power

    @abstractmethod
    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of one batch.

        Args:
            features: The backbone's stages.
            labels: Labels ``(B, h, w)``.
        """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        with torch.no_grad():
            features = self.backbone.stages(images)
        loss = self.loss(features, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def train(self, mode: bool = True) -> "HeadTraining":
        """Switch between training and evaluation, the backbone excepted."""
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_optimizers(self) -> Any:
        """SGD with a polynomial schedule by step."""
        optimizer = torch.optim.SGD(self.groups, weight_decay=self.weight_decay)
        return polynomial(self, optimizer, self.poly_power)


class HeadRefiner(TrainedRefiner):
    """A refiner that learns affinities of cells, and spreads maps by a random walk along them.

    Args:
        radius: Of the pairs in training, in cells.
        lr: Learning rate.
        beta: Power of the affinities in the walk.
        labels: What refines the training labels, ``par`` or ``crf``.
        crop: Side of the training crops in pixels, a multiple of a cell's.
        scales: Range of the factor on a picture's size in training.
        epochs: Passes over the training pictures.
        batch_size: Crops a step.
        steps: Steps of the walk.
        **options: See :class:`~lpcam.refiners.base.Refiner`.

    Attributes:
        cell: Side of a cell in pixels.
        label_settings: Names of the settings that :meth:`label` reads besides ``labels``.

    Raises:
        InputError: The crop's grid has no cell with all neighbours within the radius.
    """

    cell: ClassVar[int]
    label_settings: ClassVar[tuple[str, ...]]

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        *,
        radius: Radius,
        lr: Rate,
        beta: Exponent,
        labels: Method = "par",
        crop: Annotated[int, Field(ge=1, le=8192)] = 256,
        scales: Pair[Scale] = (1, 1),
        epochs: Count = 4,
        batch_size: Count = 8,
        steps: Steps = 256,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        smallest = (2 * radius - 1) * self.cell
        if crop < smallest or crop % self.cell:
            raise InputError(
                f"refiner.crop={crop}: give a multiple of {self.cell} of at least {smallest}, "
                f"which refiner.radius={radius} needs"
            )
        self.labels = labels
        self.radius = radius
        self.crop = crop
        self.scales = list(scales)
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.beta = beta
        self.steps = steps

    @abstractmethod
    def training(self, backbone: Backbone) -> HeadTraining:
        """The layers, not yet trained, and how they learn."""

    @abstractmethod
    def label(self, image: Image.Image, seed: SeedRecord) -> np.ndarray:
        """Training labels ``(H, W)`` uint8: 0 background, class index + 1, 255 open."""

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:  # noqa: D102 - inherited
        if self.labels == "crf":
            check_backend("pydensecrf", "refiner.labels=crf", "refiner.labels=par")
        return super().inputs(pictures)

    def training_inputs(self) -> Mapping[str, Any]:  # noqa: D102 - inherited
        names = ("labels", "radius", "crop", "scales", "epochs", "batch_size", "lr")
        settings = {name: getattr(self, name) for name in (*names, *self.label_settings)}
        return {"refiner": type(self).__name__, **settings}

    def fit(  # noqa: D102 - inherited
        self,
        folder: Path,
        pictures: Sequence[Picture],
        read_seed: Callable[[Picture], SeedRecord],
        backbone: Backbone,
        make_trainer: MakeTrainer,
        *,
        num_workers: int | None,
    ) -> None:
        if (folder / WEIGHTS).is_file():  # an earlier run was killed right after
            shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
            return
        labels = folder / "labels"
        labels.mkdir(exist_ok=True)
        training = self.training(backbone)
        crops = LabelledCrops(
            pictures,
            labels,
            partial(self._label, read_seed),
            RandomCrop(
                backbone.mean,
                backbone.std,
                scale=by_factor(self.scales),
                crop=self.crop,
                cell=self.cell,
            ),
            self.cell,
        )

        def loaders(processes: int) -> tuple[Any, None]:
            loader = DataLoader(
                crops,
                batch_size=per_process(self.batch_size, processes, "refiner.batch_size"),
                shuffle=True,
                drop_last=len(crops) >= self.batch_size,
                **decoders(num_workers),
            )
            return loader, None

        fit(
            make_trainer,
            training,
            folder / CHECKPOINT,
            loaders,
            epochs=self.epochs,
            lr_setting="refiner.lr",
        )
        save_head(folder, training.head)

    def _label(
        self, read_seed: Callable[[Picture], SeedRecord], picture: Picture, image: Image.Image
    ) -> np.ndarray:
        return self.label(image, read_seed(picture))

    def load(self, folder: Path, backbone: Backbone, device: str) -> None:  # noqa: D102 - inherited
        self._trained = self.training(backbone)
        load_head(folder, self._trained.head)
        self._trained.eval().to(device)


def save_head(folder: Path, head: nn.Module) -> None:
    """Write the trained layers, which ends the training: its checkpoint goes."""
    if is_main_process():
        state = {key: value.cpu().contiguous() for key, value in head.state_dict().items()}
        write_atomically(folder / WEIGHTS, save(state))
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)


def load_head(folder: Path, head: nn.Module) -> None:
    """Read what :func:`save_head` wrote.

    Raises:
        InputError: The file is missing, damaged, or belongs to other layers.
    """
    path = folder / WEIGHTS
    try:
        head.load_state_dict(load_file(path))
    except Exception as error:
        raise InputError(
            f"{path}: no trained refiner for this backbone ({type(error).__name__}); delete "
            f"{folder} to train again"
        ) from error


def stage_channels(backbone: Backbone) -> list[int]:
    """Channels of each of the backbone's stages."""
    device = next(backbone.parameters()).device
    with torch.no_grad():
        return [f.shape[1] for f in backbone.stages(torch.zeros(1, 3, 96, 96, device=device))]
