"""The records of a stage, a few for each picture, in one file of every process that wrote some.

Ten thousand pictures as ten thousand files are slow to copy, to list and to delete, and shared file
systems count them. A shard is a plain tar archive, which ``tar`` lists and unpacks; beside it lies
an index, a line a record: where its bytes begin, how many they are, its name. A line is written
after its bytes are, so that what a killed process left half is no record. No process writes on in
another's shard.
"""

import contextlib
import io
import os
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lpcam.storage.ranks import rank

SHARD, INDEX = ".tar", ".index"


class Records:
    """Records by name in a folder; names are those of files, such as ``2007_000032.npz``.

    A file of that name in the folder is a record too: earlier versions wrote each into its own.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._writing = threading.Lock()
        self._own: Path | None = None
        for index in sorted(folder.glob(f"*{INDEX}")):
            self._read_index(index)

    def _read_index(self, index: Path) -> None:
        shard = index.with_suffix(SHARD)
        length = shard.stat().st_size if shard.is_file() else 0
        for line in index.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):  # what else stands there is no record
                offset, size, name = line.split(b" ", 2)
                if int(offset) + int(size) <= length:
                    self._places[os.fsdecode(name)] = shard, int(offset), int(size)

    def __contains__(self, name: str) -> bool:
        return name in self._places or (self.folder / name).is_file()

    def open(self, name: str) -> BinaryIO:
        """Open a record for reading.

        Raises:
            OSError: There is no such record.
        """
        if name not in self._places:
            return (self.folder / name).open("rb")
        return io.BufferedReader(_Window(*self._places[name]))

    def read(self, name: str) -> bytes:
        """The bytes of a record.

        Raises:
            OSError: There is no such record.
        """
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Add a record; threads may do so at a time.

        Args:
            name: Its name; one that is there already is replaced.
            data: Its bytes.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        header = info.tobuf(tarfile.PAX_FORMAT)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        with self._writing:
            path = self._own or self.folder / f"{rank()}-{uuid.uuid4().hex[:8]}{SHARD}"
            start = path.stat().st_size if self._own else 0
            self._own = None  # after a failure another shard begins
            try:
                with path.open("ab") as shard:
                    for part in (header, data, padding):
                        shard.write(part)
            except BaseException:
                with contextlib.suppress(OSError):  # it was not even made
                    os.truncate(path, start)  # of a full disk it would take the last bytes
                raise
            place = start + len(header), len(data)
            with path.with_suffix(INDEX).open("ab", buffering=0) as index:
                index.write(b"%d %d %s\n" % (*place, os.fsencode(name)))
            self._places[name] = path, *place
            self._own = path


def cut_torn(folder: Path) -> None:
    """Cut off the record that a killed process was writing at the end of its shard.

    Nobody may be writing into the folder.
    """
    places = Records(folder)._places.values()
    for shard in folder.glob(f"*{SHARD}"):
        ends = [offset + size for path, offset, size in places if path == shard]
        if ends:
            os.truncate(shard, -(-max(ends) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        else:
            shard.unlink()
            shard.with_suffix(INDEX).unlink(missing_ok=True)


def shard_files(shard: Path) -> Iterator[IO[bytes]]:
    """The records of a shard one after the other, as files."""
    with tarfile.open(shard) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None  # of all else that an archive may hold nothing was written
            yield file


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size = offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._place)])
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
