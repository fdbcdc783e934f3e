"""Writing files so that no reader ever sees half of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:  # of a full disk it would take the last bytes
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left of :func:`write_atomically` in a folder and below."""
    for path in folder.rglob(".*.*"):
        path.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as :func:`write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=1))
