"""Reading ``.npz`` files, also from several threads at a time."""

import io
import threading
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

# Everything that reading raises on a missing, cut or overwritten file.
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zlib.error, BadZipFile)

# numpy reads an array's header with Python's parser, of which two threads must not make use at the
# same time in Python 3.11: now and then it raises SystemError (CPython's issue 106905).
_parsing = threading.Lock()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a file; as ``np.load``, but safe in threads. Nothing is unpickled.

    Args:
        path: An ``.npz`` file.

    Raises:
        Exception: One of :data:`DAMAGE`; the caller knows what to say of the file.
    """
    with ZipFile(path) as archive:
        parts = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    with _parsing:
        return {
            name: np.lib.format.read_array(io.BytesIO(part), allow_pickle=False)
            for name, part in parts.items()
        }
