"""One process at a time, by the operating system's locks, which end with the process."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from lpcam.errors import InputError

WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock while the body runs.

    Args:
        path: The lock's file; its folder is there.
        timeout: Seconds to wait for whoever holds it; by default without end.

    Raises:
        Timeout: It is still held.
        InputError: The file system has no locks. Files in their place would outlive a killed
            process, and everybody would wait for it.
    """
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        raise InputError(
            f"{path.parent}: this file system has no locks ({error.strerror}), so two runs could "
            "spoil each other's results; set paths.store and paths.data to another"
        ) from error
    try:
        yield
    finally:
        lock.release()
