"""Lists, names and folders of data that a user brings."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lpcam.errors import InputError
from lpcam.storage.hashing import digest


def read_lines(path: Path, remedy: str) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: It cannot be read; the message ends with the remedy.
    """
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error}); {remedy}") from error


def check_name(name: str, where: str) -> str:
    """Give back a picture's name, which also names the files made from it.

    Raises:
        InputError: It holds more than letters, digits and ``_-.``, or begins with a dot.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(
            f"{where}: {name!r} cannot name a file; use letters, digits, '_', '-' and '.'"
        )
    return name


def file_names(folder: Path) -> set[str]:
    """Names of everything in a folder; none if there is no such folder."""
    # One listing costs as much as a few checks of single files, on a network drive above all.
    return set(os.listdir(folder)) if folder.is_dir() else set()


def missing_files(folder: Path, wanted: Sequence[str]) -> str:
    """Say how many of the wanted files a folder lacks, and which; nothing if it has them all."""
    there = file_names(folder)
    missing = [name for name in wanted if name not in there]
    if not missing:
        return ""
    return f"{folder} lacks {len(missing)} of {len(wanted)} files ({abbreviate(missing)})"


def files_digest(folder: Path, names: Sequence[str], setting: str) -> str:
    """Hash names, sizes and times of files that a user brings, after making sure of them.

    Args:
        folder: Where they are.
        names: The files.
        setting: The setting that names the folder, for the message.

    Raises:
        InputError: The folder or some of the files are missing.
    """
    if not folder.is_dir():
        raise InputError(f"{setting}={folder}: no such folder; name the one that holds {names[:1]}")
    lacks = missing_files(folder, names)
    if lacks:
        raise InputError(f"{setting}: {lacks}; add these files")
    stats = [(folder / name).stat() for name in names]
    rows = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]
    return digest(rows)


def abbreviate(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return ", ".join([*names[:3], *more])
