"""A trained segmentation network as one file, which knows its classes and how it was built."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lpcam.errors import InputError
from lpcam.segmentation.networks import Architecture, SegmentationNetwork, build_network
from lpcam.settings import make
from lpcam.storage.files import write_atomically

HEADER = "segmentation network"


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        network: The network, ready to label pictures.
        classes: Names of its classes.
    """

    network: SegmentationNetwork
    classes: tuple[str, ...]


def save_network(
    path: Path,
    network: SegmentationNetwork,
    classes: Sequence[str],
    backbone: str,
    architecture: Architecture,
) -> None:
    """Write a network's weights, and what it takes to build it again.

    Args:
        path: The ``.safetensors`` file.
        network: The network.
        classes: Names of its classes.
        backbone: The backbone's name.
        architecture: Which network.
    """
    described = {
        "classes": list(classes),
        "backbone": backbone,
        "architecture": asdict(architecture),
    }
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    # One entry: of several the order in the file would be a matter of chance.
    write_atomically(path, save(state, {HEADER: json.dumps(described)}))


def load_network(path: Path) -> Trained:
    """Read what :func:`save_network` wrote.

    Raises:
        InputError: The file is missing, damaged, or no segmentation network.
    """
    remedy = "give network.safetensors, which train.py task=segmentation leaves"
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:80]
        raise InputError(
            f"{path}: no readable segmentation network ({reason}); {remedy}"
        ) from error
    if HEADER not in header:
        raise InputError(f"{path}: holds no segmentation network; {remedy}")
    try:
        described = json.loads(header[HEADER])
        classes = tuple(described["classes"])
        architecture = make(Architecture, described["architecture"])
        network = build_network(described["backbone"], None, len(classes), architecture)
        network.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({type(error).__name__}); train it again") from error
    return Trained(network.eval(), classes)
