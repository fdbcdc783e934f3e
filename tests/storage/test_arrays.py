import gc
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lpcam.storage.arrays import DAMAGE, read_arrays


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads take turns inside Python's parser, which garbage collection makes them do."""

    def give_way(*_: object) -> None:
        time.sleep(0)

    before, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    gc.callbacks.append(give_way)
    yield
    gc.callbacks.remove(give_way)
    gc.set_threshold(*before)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_many_threads_read_at_a_time(tmp_path: Path) -> None:
    """With ``np.load`` this ends in a SystemError at once in Python 3.11."""
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.ones((3, 4, 5), np.float16)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read_arrays(tmp_path / "x.npz"), range(2000)))
    for found in results:
        assert list(found) == ["a", "b"]
        assert all((found[name] == arrays[name]).all() for name in arrays)
        assert all(found[name].dtype == arrays[name].dtype for name in arrays)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", bytes(1000)])
def test_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DAMAGE):
        read_arrays(tmp_path / "x.npz")
