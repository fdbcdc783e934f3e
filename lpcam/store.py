"""A content-addressed store: the result of a stage lies under a hash of everything it depends on.

A stage is a folder ``<root>/<name>/<key>/``. It is filled under the name ``<key>.partial`` and
renamed when whole, with ``manifest.json`` written last, so a folder that has its final name is
complete. A lock file beside it keeps two processes from computing the same thing; the operating
system releases the lock when a process dies.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


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


def is_main_process() -> bool:
    """Whether this is the first, or only, process of a distributed job."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it, so a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(path)


class Stage:
    """One result in the store, there or still to be computed.

    Args:
        root: The store's folder.
        name: What kind of result it is ("features", "maps", ...).
        inputs: Every value that the result depends on, hashes of upstream stages included.

    Attributes:
        folder: Where the result lies once it is there.
        seconds: What it took, if this object computed it.
    """

    def __init__(self, root: Path, name: str, inputs: Mapping[str, Any]) -> None:
        self.name = name
        self.inputs = dict(inputs)
        self.key = digest({"stage": name, **self.inputs})
        self.folder = root / name / self.key
        self.seconds: float | None = None
        self._partial = self.folder.with_name(f"{self.key}.partial")

    @property
    def done(self) -> bool:
        """Whether the whole result is there."""
        return (self.folder / "manifest.json").is_file()

    @property
    def manifest(self) -> dict[str, Any]:
        """What made this result, and the seconds it took."""
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    @contextlib.contextmanager
    def build(self, *, resume: bool = False) -> Iterator[Path | None]:
        """Compute the stage unless it is there.

        Args:
            resume: Keep what an earlier, killed process left in the folder.

        Yields:
            The folder to fill, or None when nothing is left to do. If the body raises, the folder
            keeps its temporary name.
        """
        if self.done:
            yield None
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if not is_main_process():
            # Rank 0 of a distributed job holds the lock and finishes the folder for all ranks.
            self._partial.mkdir(exist_ok=True)
            yield self._partial
            return
        with FileLock(self.folder.with_suffix(".lock")):
            if self.done:
                yield None
                return
            if not resume:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(exist_ok=True)
            start = time.perf_counter()
            yield self._partial
            self.seconds = round(time.perf_counter() - start, 3)
            manifest = {"stage": self.name, "inputs": self.inputs, "seconds": self.seconds}
            write_atomically(self._partial / "manifest.json", json.dumps(manifest, indent=1))
            self._partial.rename(self.folder)
