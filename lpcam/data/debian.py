"""Files out of Debian packages, without installing them."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lpcam.errors import InputError


def fetch(package: str, members: Mapping[str, Path], folder: Path, remedy: str) -> None:
    """Download a package and unpack some of its files.

    Args:
        package: The package's name.
        members: For each wanted path in the package, without a leading slash, where it goes.
        folder: An existing folder; the downloaded package lies there until it is unpacked.
        remedy: What the user may do instead, for the error message.

    Raises:
        InputError: There is no apt-get or dpkg-deb, one of them fails, or the package lacks a
            file.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise InputError(f"{program}: not found, needed to fetch {package}; {remedy}")
    error = _apt_get(["download", package], folder)
    if error and os.geteuid() == 0:
        # A fresh machine or container has no package lists yet.
        error = _apt_get(["update"], folder) or _apt_get(["download", package], folder)
    if error:
        raise InputError(f"apt-get download {package}: {error}; run 'apt-get update', or {remedy}")
    for archive in folder.glob(f"{package}_*.deb"):
        error = _unpack(archive, members)
        archive.unlink()
    missing = [name for name, path in members.items() if not path.is_file()]
    if error or missing:
        raise InputError(f"{package}: {error or f'has no {missing[0]}'}; {remedy}")


def _apt_get(arguments: Sequence[str], folder: Path) -> str:
    """Run apt-get in a folder; what went wrong in one line, or nothing."""
    done = subprocess.run(
        ["apt-get", *arguments],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    return _last_line(done.stderr, done.returncode)


def _unpack(archive: Path, members: Mapping[str, Path]) -> str:
    """Copy the wanted members out of a package; what went wrong in one line, or nothing.

    A member only chooses among the destinations given, so a package cannot write elsewhere.
    """
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        damage = ""
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    path = members.get(member.name.removeprefix("./"))
                    content = tar.extractfile(member) if path and member.isfile() else None
                    if path and content:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(content.read())
        except tarfile.TarError as error:
            damage = f"damaged ({error})"
        _, stderr = process.communicate()
    return _last_line(stderr.decode(errors="replace"), process.returncode) or damage


def _last_line(text: str, status: int) -> str:
    lines = text.strip().splitlines()
    return "" if status == 0 else lines[-1] if lines else f"exit status {status}"
