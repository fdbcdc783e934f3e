"""Networks that label every pixel: DeepLabV2 on a backbone, or one of another package by name."""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lpcam.errors import InputError
from lpcam.models.backbones import Backbone, build_backbone
from lpcam.models.sum_head import SumHead
from lpcam.settings import CHECKED, Count, Text

OWN = "deeplab_v2"
MULTIPLE = 32  # pixels; what the other networks take has sides that are multiples


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Architecture:
    """Which network.

    Attributes:
        architecture: ``deeplab_v2``, or a name of segmentation-models-pytorch's, such as
            ``deeplabv3plus`` or ``upernet``.
        output_stride: Pixels between two positions of the backbone's grid, see
            :func:`~lpcam.models.backbones.build_backbone`; DeepLabV2 only.
        rates: Dilations of DeepLabV2's branches.
        batch_norm: Whether the backbone's BatchNorm is ``frozen``, statistics and weights, or
            ``learnt``. Layers behind the backbone always learn theirs.
    """

    architecture: Text
    output_stride: Count | None = None
    rates: Annotated[tuple[Count, ...], Field(min_length=1)] = (6, 12, 18, 24)
    batch_norm: Literal["frozen", "learnt"] = "frozen"


class SegmentationNetwork(nn.Module):
    """Scores of background and classes at every position of a grid.

    Args:
        backbone: Gives the normalisation of its pictures.
        encoder: The part whose weights were learnt elsewhere.
        frozen_norms: Whether the encoder's BatchNorm stays as it is.

    Attributes:
        mean: Per-channel mean that its pictures are normalised with.
        std: Per-channel standard deviation.
    """

    def __init__(self, backbone: Backbone, encoder: nn.Module, *, frozen_norms: bool) -> None:
        super().__init__()
        self.mean, self.std = backbone.mean, backbone.std
        self._old = {id(parameter) for parameter in encoder.parameters()}
        found = (m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._frozen = list(found) if frozen_norms else []
        for norm in self._frozen:
            norm.requires_grad_(False)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Scores before softmax, background first.

        Args:
            images: Normalised pictures ``(B, 3, H, W)`` of any size.

        Returns:
            ``(B, C + 1, h, w)``, on a grid of its own.
        """

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, frozen BatchNorm excepted."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def groups(self, lr: float, factor: float, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that learn, by learning rate.

        As published for DeepLabV2, new layers learn ``factor`` times as fast as the encoder, their
        biases twice as fast as that and without weight decay.

        Args:
            lr: Learning rate of the encoder.
            factor: See above.
            weight_decay: Weight decay of all else.
        """
        encoder: list[nn.Parameter] = []
        weights: list[nn.Parameter] = []
        biases: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in self._old:
                encoder.append(parameter)
            else:
                (biases if name.endswith("bias") else weights).append(parameter)
        groups = (
            (encoder, lr, weight_decay),
            (weights, lr * factor, weight_decay),
            (biases, 2 * lr * factor, 0.0),
        )
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for parameters, rate, decay in groups
            if parameters
        ]


class DeepLabV2(SegmentationNetwork):
    """A backbone and a :class:`SumHead` on its local features.

    Args:
        backbone: The backbone; it becomes a part.
        outputs: Background and classes.
        settings: Dilations, and what becomes of BatchNorm.
    """

    def __init__(self, backbone: Backbone, outputs: int, settings: Architecture) -> None:
        frozen = settings.batch_norm == "frozen"
        backbone.network.reset_classifier(0)  # it would learn nothing
        super().__init__(backbone, backbone, frozen_norms=frozen)
        backbone.learns_norms = not frozen
        self.backbone = backbone
        self.head = SumHead(backbone.dim, outputs, settings.rates)
        self.train()

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102 - inherited
        return self.head(self.backbone(images))


class PackageNetwork(SegmentationNetwork):
    """A network of segmentation-models-pytorch's, its encoder with the weights of a backbone.

    Args:
        backbone: Whose weights.
        outputs: Background and classes.
        settings: Which network, and what becomes of the encoder's BatchNorm.

    Raises:
        InputError: The package is missing, it has no such network, or not with this backbone.
    """

    def __init__(self, backbone: Backbone, outputs: int, settings: Architecture) -> None:
        network = _from_package(settings.architecture, backbone, outputs)
        super().__init__(backbone, network.encoder, frozen_norms=settings.batch_norm == "frozen")
        self.network = network
        self.train()

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102 - inherited
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        return self.network(padded)[:, :, :height, :width]


def build_network(
    name: str, weights: str | None, num_classes: int, settings: Architecture
) -> SegmentationNetwork:
    """Build a network that is not trained yet.

    Args:
        name: The backbone, see :func:`~lpcam.models.backbones.build_backbone`.
        weights: Likewise.
        num_classes: Number of classes C.
        settings: Which network.

    Raises:
        InputError: There is no such network, or its weights cannot be had.
    """
    if settings.architecture == OWN:
        backbone = build_backbone(name, weights, output_stride=settings.output_stride)
        return DeepLabV2(backbone, num_classes + 1, settings)
    return PackageNetwork(build_backbone(name, weights), num_classes + 1, settings)


def _from_package(architecture: str, backbone: Backbone, outputs: int) -> Any:
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise InputError(
            f"segmenter.architecture={architecture}: its package is missing; pip install "
            f"'lpcam[segmentation]', or take segmenter.architecture={OWN}"
        ) from error
    if architecture not in smp.MODEL_ARCHITECTURES_MAPPING:
        known = ", ".join((OWN, *smp.MODEL_ARCHITECTURES_MAPPING))
        raise InputError(f"segmenter.architecture={architecture}: choose from {known}")
    encoder = f"tu-{backbone.network.pretrained_cfg['architecture']}"
    cause = ""
    for options in ({"strict_img_size": False}, {}):  # which a Swin needs, and others do not know
        try:
            network: Any = smp.create_model(
                architecture, encoder, encoder_weights=None, classes=outputs, **options
            )
            with torch.no_grad():
                network.eval()(torch.zeros(1, 3, 2 * MULTIPLE, 3 * MULTIPLE))
            _copy_weights(backbone, network.encoder.model)
            return network
        except Exception as error:  # of several kinds
            cause = str(error).strip().splitlines()[0][:120]
    raise InputError(
        f"segmenter.architecture={architecture}: not with backbone.name={backbone.name} "
        f"({cause}); choose another of either"
    )


def _copy_weights(backbone: Backbone, encoder: nn.Module) -> None:
    """Give timm's features-only form of a network the weights of the network itself.

    Its keys are the same but for a prefix, and underscores in the place of dots.
    """

    def plain(key: str) -> str:
        return key.removeprefix("model.").replace(".", "_")

    weights = {plain(key): value for key, value in backbone.network.state_dict().items()}
    encoder.load_state_dict({key: weights[plain(key)] for key in encoder.state_dict()})
