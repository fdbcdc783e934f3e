"""A content-addressed store: the result of a stage lies under a hash of everything it depends on.

A stage is a folder ``<root>/<name>/<key>/``. It is filled under the name ``<key>.partial`` and
renamed when whole, with ``manifest.json`` written last, so a folder that has its final name is
complete. A lock file beside it keeps two processes from computing the same thing; the operating
system releases the lock when a process dies.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.markup import escape
from rich.table import Table


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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as :func:`write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=1))


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
            write_json(self._partial / "manifest.json", manifest)
            self._partial.rename(self.folder)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lpcam.store list|prune``: what the store holds, and what may go.

    Args:
        arguments: Those after the program's name; the process's own by default.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser("python -m lpcam.store", description=main.__doc__)
    parser.add_argument("command", choices=("list", "prune"))
    parser.add_argument("--root", type=Path, default=Path("store"), help="the store's folder")
    parser.add_argument("--stage", help="only results of this kind, such as views")
    parser.add_argument("--days", type=float, default=0, help="prune: only what is so old")
    parser.add_argument("--partial", action="store_true", help="prune: only unfinished results")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        print(f"error: {options.root}: no such store; give --root", file=sys.stderr)
        return 1
    if options.command == "prune":
        freed = prune(options.root, stage=options.stage, days=options.days, partial=options.partial)
        print(f"{freed / 1e6:.1f} MB freed")
        return 0
    table = Table("stage", "key", "made from")
    for heading in ("MB", "days"):
        table.add_column(heading, justify="right")
    shown = [r for r in results(options.root) if options.stage in (None, r["stage"])]
    for result in shown:
        inputs = ", ".join(f"{key}={value}" for key, value in result["inputs"].items())
        table.add_row(
            result["stage"],
            result["folder"].name,
            escape(inputs if len(inputs) < 200 else f"{inputs[:197]}..."),
            f"{result['bytes'] / 1e6:.1f}",
            f"{result['age']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"{len(shown)} results, {sum(r['bytes'] for r in shown) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
