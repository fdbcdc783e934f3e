import gc
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpcam.errors import InputError
from lpcam.storage.arrays import DAMAGE, read_arrays, stored


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


def write_npz(path: Path) -> None:
    np.savez(path, a=np.arange(500.0))


def write_npy(path: Path) -> None:
    np.save(path, np.arange(500.0))


def write_tensors(path: Path) -> None:
    save_file({"a": np.arange(500.0)}, path)


@pytest.mark.parametrize(
    ("suffix", "write", "read"),
    [
        ("npz", write_npz, read_arrays),
        ("npy", write_npy, np.load),
        ("safetensors", write_tensors, load_file),
        ("json", lambda p: p.write_text('{"a": 1}'), lambda p: json.loads(p.read_text())),
    ],
)
def test_a_file_of_the_store_that_was_altered_is_one_line(
    tmp_path: Path, suffix: str, write: Any, read: Any
) -> None:
    path = tmp_path / "store" / "stage" / "key" / f"result.{suffix}"
    path.parent.mkdir(parents=True)
    write(path)
    with stored(path):
        read(path)
    data = bytearray(path.read_bytes())
    data[1 : len(data) // 2] = bytes(len(data) // 2 - 1)
    path.write_bytes(data)
    with pytest.raises(InputError) as caught, stored(path):
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: damaged since it was made (")
    assert line.endswith(f"run: lpcam store verify --root {tmp_path / 'store'}")


def test_one_array_is_read_without_the_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", small=np.ones(2), large=np.zeros(10))
    assert read_arrays(tmp_path / "a.npz", "small").keys() == {"small"}
    with pytest.raises(KeyError):
        read_arrays(tmp_path / "a.npz", "none")
