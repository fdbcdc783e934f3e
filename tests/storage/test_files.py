import json
from pathlib import Path

import pytest

from lpcam.storage.files import write_atomically, write_json


@pytest.mark.parametrize("data", ["text ü\n", b"\x00\xff"])
def test_write_atomically(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    write_atomically(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "result.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_value_that_is_no_json_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"k": 12, "tau": [0.1, None]})
    with pytest.raises(TypeError):
        write_json(path, {"k": object()})
    assert json.loads(path.read_text()) == {"k": 12, "tau": [0.1, None]}
    assert list(tmp_path.iterdir()) == [path]
