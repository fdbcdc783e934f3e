"""A content-addressed store: the result of a stage lies under a hash of everything it depends on.

A stage is a folder ``<root>/<name>/<key>/``. It is filled under the name ``<key>.partial`` and
renamed when whole, with ``manifest.json`` written last, so a folder that has its final name is
complete. A lock file beside it keeps two processes from computing the same thing; the operating
system releases the lock when a process dies.

The manifest lists the size of every file. A stage is served only if all are there and have theirs;
otherwise it is made again, of a stage that is made picture by picture what is missing. What was
altered and kept its size is found by :func:`verify`, which reads everything.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

from filelock import Timeout

from lpcam.storage.files import remove_temporary, write_json
from lpcam.storage.hashing import digest
from lpcam.storage.locks import locked
from lpcam.storage.ranks import agree, barrier, is_main_process
from lpcam.storage.records import INDEX, SHARD, Records, cut_torn, shard_files


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
        self._whole = False

    @property
    def done(self) -> bool:
        """Whether the whole result is there; looked at until it is."""
        self._whole = self._whole or (self.folder.is_dir() and not damage(self.folder))
        return self._whole

    @property
    def manifest(self) -> dict[str, Any]:
        """What made this result, and the seconds it took."""
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    @cached_property
    def records(self) -> Records:
        """The records that the whole result holds."""
        return Records(self.folder)

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
        lock = locked(self.folder.with_suffix(".lock"))
        with lock if finishes and not self.done else contextlib.nullcontext():
            if agree(self.done) if together else self.done:
                yield None
                return
            if finishes:
                self._clear(resume=resume)
            if together:
                barrier()
            self._partial.mkdir(exist_ok=True)
            start = time.perf_counter()
            yield self._partial
            if together:
                barrier()  # every process has written its part
            if finishes:
                cut_torn(self._partial)
                self.seconds = round(time.perf_counter() - start, 3)
                manifest = {
                    "stage": self.name,
                    "inputs": self.inputs,
                    "seconds": self.seconds,
                    "files": _sizes(self._partial),
                    "checks": _checksums(self._partial),
                }
                write_json(self._partial / "manifest.json", manifest)
                self._partial.rename(self.folder)
            if together:
                barrier()

    def _clear(self, *, resume: bool) -> None:
        """Remove what cannot be gone on from: of a killed process, or a result that is damaged."""
        if self.folder.is_dir():
            found = damage(self.folder)
            print(f"store: {'; '.join(found[:3])}: made again", file=sys.stderr)
            if not resume:
                shutil.rmtree(self.folder)
            else:
                shutil.rmtree(self._partial, ignore_errors=True)
                for name in ("manifest.json", *_differing(self.folder)):
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rename(self._partial)
        if resume:
            remove_temporary(self._partial)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def damage(folder: Path, *, read: bool = False) -> list[str]:
    """What is wrong with a finished result, a line a file; nothing if it is whole.

    Args:
        folder: The result's folder.
        read: Read every file too, instead of looking at sizes alone.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        # Earlier versions listed no files; what they made is believed.
        wanted, checks = dict(manifest.get("files", {})), dict(manifest.get("checks", {}))
        manifest["inputs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'manifest.json'}: not a readable manifest ({type(error).__name__})"]
    there = _sizes(folder)
    found = [
        f"{folder / name}: {there[name]} bytes instead of {size}"
        if name in there
        else f"{folder / name}: gone"
        for name, size in wanted.items()
        if there.get(name) != size
    ]
    if read and not found:
        found = [
            f"{folder / name}: altered"
            for name in wanted
            if not _sound(folder / name, checks.get(name))
        ]
    return found


def _differing(folder: Path) -> list[str]:
    """Names of files that have another size than the manifest says; all if it cannot be read.

    Shards are left: their index tells which of their records are whole.
    """
    there = _sizes(folder)
    try:
        wanted = dict(json.loads((folder / "manifest.json").read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        wanted = {}
    return [
        name
        for name, size in there.items()
        if wanted.get(name) != size and not name.endswith((SHARD, INDEX))
    ]


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder and below, the manifest excepted, by its path in there."""
    found = {}
    for parent, _, names in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        for name in names:
            found[(inside / name).as_posix()] = os.stat(os.path.join(parent, name)).st_size
    found.pop("manifest.json", None)
    return dict(sorted(found.items()))


def _checksums(folder: Path) -> dict[str, int]:
    """Checksums of the files; an ``.npz`` has its own, and so have those in a shard."""
    return {
        name: zlib.crc32((folder / name).read_bytes())
        for name in _sizes(folder)
        if not name.endswith((".npz", SHARD))
    }


def _sound(path: Path, check: int | None) -> bool:
    """Whether a file holds what was written: by its checksum, or as an ``.npz`` by its own."""
    try:
        if path.suffix == SHARD:
            return all(map(_whole_record, shard_files(path)))
        if path.suffix == ".npz":
            return _whole_archive(path)
        return zlib.crc32(path.read_bytes()) == check
    except Exception:  # of a dozen kinds, from the archive's parts
        return False


def _whole_record(file: IO[bytes]) -> bool:
    """Whether a record is whole: JSON where it is text, else an archive."""
    start = file.read(1)
    file.seek(0)
    if start in (b"[", b"{"):
        json.load(file)
        return True
    return _whole_archive(file)


def _whole_archive(file: Path | IO[bytes]) -> bool:
    with ZipFile(file) as archive:
        return archive.testzip() is None


def _size(folder: Path) -> int:
    return sum(_sizes(folder).values())


def results(root: Path, stage: str = "*") -> list[dict[str, Any]]:
    """What lies in a store, the largest first.

    Args:
        root: The store's folder.
        stage: Only results of this kind.

    Returns:
        For each result its ``folder``, ``stage``, ``bytes``, ``age`` in days, ``inputs``, and
        whether it is ``whole``; inputs of a result that is not are empty.
    """
    found = []
    for folder in root.glob(f"{stage}/*/"):
        with contextlib.suppress(FileNotFoundError):  # a run finished it meanwhile, or a prune
            whole = folder.suffix != ".partial" and not damage(folder)
            inputs = json.loads((folder / "manifest.json").read_text())["inputs"] if whole else {}
            found.append(
                {
                    "folder": folder,
                    "stage": folder.parent.name,
                    "bytes": _size(folder),
                    "age": (time.time() - folder.stat().st_mtime) / 86400,
                    "inputs": inputs,
                    "whole": whole,
                }
            )
    return sorted(found, key=lambda result: -result["bytes"])


def verify(root: Path) -> dict[Path, list[str]]:
    """Read everything that a store holds.

    Args:
        root: The store's folder.

    Returns:
        For each result, unfinished ones excepted, what is wrong with it; nothing where it is whole.
    """
    return {
        folder: damage(folder, read=True)
        for folder in sorted(root.glob("*/*/"))
        if folder.suffix != ".partial"
    }


def prune(root: Path, *, stage: str | None = None, days: float = 0, partial: bool = False) -> int:
    """Delete results; a run that needs one makes it again.

    What a run is making at this moment stays. One that reads what is deleted ends with a line, and
    goes on where it was when it is started again.

    Args:
        root: The store's folder.
        stage: Only results of this kind.
        days: Only what has lain there for at least so many days.
        partial: Only what was never finished.

    Returns:
        Bytes that were freed.
    """
    freed = 0
    for result in results(root, stage or "*"):
        folder = result["folder"]
        if result["age"] < days or (partial and result["whole"]):
            continue
        with (
            contextlib.suppress(Timeout, FileNotFoundError),
            locked(folder.parent / f"{folder.stem}.lock", timeout=0),
        ):
            shutil.rmtree(folder)
            freed += result["bytes"]
    return freed
