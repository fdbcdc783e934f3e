"""Reading ``.npz`` files, also from several threads at a time."""

import io
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
from safetensors import SafetensorError

from lpcam.errors import InputError
from lpcam.storage.records import Records

# Everything that reading raises on a missing, cut, overwritten or hostile file.
DAMAGE = (
    OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, SyntaxError,
    zlib.error, BadZipFile, TokenError,
)  # fmt: skip
# Bytes of all arrays of a file: a picture's features at eight scales take less, and of one that was
# made to fill the memory a megabyte holds a thousand.
LARGEST = 2**30

# numpy reads an array's header with Python's parser, of which two threads must not make use at the
# same time in Python 3.11: now and then it raises SystemError (CPython's issue 106905).
_parsing = threading.Lock()


def read_arrays(path: Path | BinaryIO, only: str | None = None) -> dict[str, np.ndarray]:
    """Read arrays of a file; as ``np.load``, but safe in threads. Nothing is unpickled.

    Args:
        path: An ``.npz`` file, or one that is open.
        only: The one array that is wanted; None for all.

    Raises:
        Exception: One of :data:`DAMAGE`; the caller knows what to say of the file.
    """
    with ZipFile(path) as archive:
        wanted = archive.namelist() if only is None else [f"{only}.npy"]
        if sum(archive.getinfo(name).file_size for name in wanted) > LARGEST:
            raise ValueError(f"unpacked it has more than {LARGEST >> 20} MB")
        parts = {name.removesuffix(".npy"): archive.read(name) for name in wanted}
    with _parsing:
        return {
            name: np.lib.format.read_array(io.BytesIO(part), allow_pickle=False)
            for name, part in parts.items()
        }


@contextmanager
def stored(path: Path) -> Iterator[Path]:
    """Say of a file of the store that it is damaged, and what to do, if reading it fails.

    Args:
        path: The file.

    Yields:
        The file.

    Raises:
        InputError: The body raised what damage makes reading raise.
    """
    try:
        yield path
    except (*DAMAGE, SafetensorError) as error:
        root = path.parents[2]
        raise InputError(
            f"{path}: damaged since it was made ({type(error).__name__}); "
            f"run: lpcam store verify --root {root}"
        ) from error


@contextmanager
def stored_record(records: Records, name: str) -> Iterator[BinaryIO]:
    """Open a record of the store for reading, as :func:`stored`.

    Args:
        records: The stage's records.
        name: The record's name.

    Yields:
        The open record.

    Raises:
        InputError: It is missing, or the body raised what damage makes reading raise.
    """
    with stored(records.folder / name), records.open(name) as file:
        yield file
