"""What values, files and tensors are told apart by. Imports nothing heavy."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def digest(value: Any) -> str:
    """Hash JSON data independently of the order of its keys.

    Args:
        value: Anything that JSON can hold.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Hash a file's bytes (SHA-256, hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_digest(tensors: Mapping[str, "Tensor"]) -> str:
    """Hash tensors with their names, shapes and types, wherever they lie.

    Args:
        tensors: Such as the ``state_dict`` of a model: every weight and statistic. What has no
            weights does not count, such as strides: the same network at another resolution has the
            same hash.

    Returns:
        16 hexadecimal digits.
    """
    import torch

    state = hashlib.sha256()
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):  # a state_dict may hold a module's other state too
            state.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            # NumPy has no bfloat16, so the bytes are taken in torch.
            flat = value.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]
