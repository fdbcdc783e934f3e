"""A content-addressed store: the result of a stage lies under a hash of everything it depends on.

A stage is a folder ``<root>/<name>/<key>/``. It is filled under the name ``<key>.partial`` and
renamed when whole, with ``manifest.json`` written last, so a folder that has its final name is
complete. A lock file beside it keeps two processes from computing the same thing; the operating
system releases the lock when a process dies.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from lpcam.storage.files import write_json
from lpcam.storage.hashing import digest
from lpcam.storage.ranks import agree, barrier, is_main_process


class Stage:
    """One result in the store, there or still to be computed.

    Args:
        root: The store's folder.
        name: What kind of result it is ("features", "maps", ...).
        inputs: Every value that the result depends on, hashes of upstream stages included.
        version: Of the formula; raised when equal inputs give another result than before.

    Attributes:
        folder: Where the result lies once it is there.
        seconds: What it took, if this object computed it.
    """

    def __init__(
        self, root: Path, name: str, inputs: Mapping[str, Any], *, version: int = 1
    ) -> None:
        self.name = name
        self.inputs = {**inputs, "version": version}
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
    def build(self, *, resume: bool = False, together: bool = False) -> Iterator[Path | None]:
        """Compute the stage unless it is there.

        Args:
            resume: Keep what an earlier, killed process left in the folder.
            together: All processes of a distributed job compute it; they go on together once it
                has its name. Otherwise one process does, whichever comes first, and others wait.

        Yields:
            The folder to fill, or None when nothing is left to do. If the body raises, the folder
            keeps its temporary name.
        """
        finishes = not together or is_main_process()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_suffix(".lock"))
        with lock if finishes and not self.done else contextlib.nullcontext():
            if agree(self.done) if together else self.done:
                yield None
                return
            if finishes and not resume:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(exist_ok=True)
            start = time.perf_counter()
            yield self._partial
            if together:
                barrier()  # every process has written its part
            if finishes:
                self.seconds = round(time.perf_counter() - start, 3)
                manifest = {"stage": self.name, "inputs": self.inputs, "seconds": self.seconds}
                write_json(self._partial / "manifest.json", manifest)
                self._partial.rename(self.folder)
            if together:
                barrier()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def results(root: Path) -> list[dict[str, Any]]:
    """What lies in a store, the largest first.

    Args:
        root: The store's folder.

    Returns:
        For each result its ``folder``, ``stage``, ``bytes``, ``age`` in days, ``inputs``, and
        whether it is ``whole``; inputs of a result that is not are empty.
    """
    found = []
    for folder in root.glob("*/*/"):
        manifest = folder / "manifest.json"
        whole = manifest.is_file() and folder.suffix != ".partial"
        found.append(
            {
                "folder": folder,
                "stage": folder.parent.name,
                "bytes": _size(folder),
                "age": (time.time() - folder.stat().st_mtime) / 86400,
                "inputs": json.loads(manifest.read_text())["inputs"] if whole else {},
                "whole": whole,
            }
        )
    return sorted(found, key=lambda result: -result["bytes"])


def prune(root: Path, *, stage: str | None = None, days: float = 0, partial: bool = False) -> int:
    """Delete results; a run that needs one makes it again.

    Args:
        root: The store's folder.
        stage: Only results of this kind.
        days: Only what has lain there for at least so many days.
        partial: Only what was never finished.

    Returns:
        Bytes that were freed.
    """
    freed = 0
    for result in results(root):
        folder = result["folder"]
        if result["age"] < days or stage not in (None, result["stage"]):
            continue
        if partial and result["whole"]:
            continue
        with FileLock(folder.parent / f"{folder.stem}.lock"):
            shutil.rmtree(folder)
        freed += result["bytes"]
    return freed
