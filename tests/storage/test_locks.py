"""Several processes on one store, with locks, without any, and with locks that do nothing."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lpcam.__main__ import main
from lpcam.errors import InputError
from lpcam.storage import store as store_module
from lpcam.storage.files import write_atomically
from lpcam.storage.locks import locked
from lpcam.storage.store import Stage, damage, verify

NAMES = [f"{number:03d}.json" for number in range(60)]
FORK = multiprocessing.get_context("fork")


def build(root: Path, k: int, *, resume: bool) -> None:
    """Fill a stage as a pass does, with pauses in which others get their turn."""
    with Stage(root, "maps", {"k": k}).build(resume=resume) as folder:
        for name in NAMES if folder else ():
            if not (folder / name).is_file():
                time.sleep(random.random() / 500)
                write_atomically(folder / name, f'"{k} {name}"' * 50)


def together(*jobs: Any) -> list[int]:
    processes = [FORK.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode or 0 for process in processes]


def whole(root: Path, k: int) -> bool:
    folder = Stage(root, "maps", {"k": k}).folder
    return not damage(folder, read=True) and all(
        (folder / name).read_text() == f'"{k} {name}"' * 50 for name in NAMES
    )


@pytest.mark.parametrize("resume", [True, False])
def test_two_sweeps_on_one_store(tmp_path: Path, resume: bool) -> None:
    def sweep(order: list[int]) -> Any:
        return lambda: [build(tmp_path, k, resume=resume) for k in order]

    assert together(sweep([1, 2, 3]), sweep([3, 2, 1])) == [0, 0]
    assert all(whole(tmp_path, k) for k in (1, 2, 3))
    assert not list(tmp_path.rglob("*.partial"))


def test_prunes_during_a_build_leave_it_alone(tmp_path: Path) -> None:
    def prune() -> None:
        for _ in range(30):
            main(["store", "prune", "--root", str(tmp_path)])
            main(["store", "list", "--root", str(tmp_path)])
            time.sleep(0.005)

    build(tmp_path, 9, resume=True)
    assert together(lambda: build(tmp_path, 1, resume=True), prune) == [0, 0]
    build(tmp_path, 1, resume=True)  # the last prune may have come after the build
    assert whole(tmp_path, 1)


def test_locks_that_do_nothing_spoil_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network drives: the one that comes too late may fail, with an error of the system.

    Whoever runs next finds a result that is whole, or makes it. So it is with stages of a file a
    picture; those that do not go on where they were are a single file, written at their end.
    """
    monkeypatch.setattr(store_module, "locked", lambda *_, **__: contextlib.nullcontext())

    def attempt() -> None:
        try:
            build(tmp_path, 1, resume=True)
        except OSError:
            os._exit(3)

    for _ in range(5):
        assert set(together(attempt, attempt, attempt)) <= {0, 3}
        build(tmp_path, 1, resume=True)
        assert whole(tmp_path, 1)
        assert not any(verify(tmp_path).values())
        main(["store", "prune", "--root", str(tmp_path)])


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"no locks \(.*set paths\.store") as caught:
        build(tmp_path, 1, resume=True)
    assert str(caught.value).startswith(f"{tmp_path / 'maps'}: ")


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    def die() -> None:
        with locked(tmp_path / "a.lock"):
            os._exit(9)

    assert together(die) == [9]
    assert (tmp_path / "a.lock").exists()
    with locked(tmp_path / "a.lock", timeout=1):
        pass
