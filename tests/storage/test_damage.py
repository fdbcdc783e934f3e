"""What the store does about files that were cut, altered or deleted behind its back."""

import json
from pathlib import Path

import numpy as np
import pytest

from lpcam.__main__ import main
from lpcam.storage.store import Stage, damage, results

NAMES = ("a.npz", "b.npz", "deep/c.json")


def make(root: Path, *, resume: bool, made: list[str]) -> Stage:
    """A stage of three files, one after the other; what had to be made is noted."""
    stage = Stage(root, "maps", {"k": 4})
    with stage.build(resume=resume) as folder:
        for name in NAMES if folder else ():
            path = folder / name
            if path.is_file():
                continue
            path.parent.mkdir(exist_ok=True)
            if path.suffix == ".npz":
                np.savez(path, maps=np.arange(200))
            else:
                path.write_text('{"miou": 0.5}')
            made.append(name)
    return stage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_what_was_cut_or_deleted_is_named_and_made_again(
    tmp_path: Path, capsys, resume: bool, name: str, harm
) -> None:
    stage = make(tmp_path, resume=resume, made=[])
    before = {n: (stage.folder / n).read_bytes() for n in NAMES}
    harm(stage.folder / name)
    assert not Stage(tmp_path, "maps", {"k": 4}).done
    made: list[str] = []
    make(tmp_path, resume=resume, made=made)
    assert made == ([name] if resume else list(NAMES))
    line = capsys.readouterr().err
    assert str(stage.folder / name) in line
    assert line.count("\n") == 1
    assert {n: (stage.folder / n).read_bytes() for n in NAMES} == before
    assert not damage(stage.folder, read=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": 1}', "\0\0"])
def test_a_broken_manifest_hides_nothing_and_stops_nothing(
    tmp_path: Path, capsys, text: str
) -> None:
    stage = make(tmp_path, resume=True, made=[])
    (stage.folder / "manifest.json").write_text(text)
    assert [found["whole"] for found in results(tmp_path)] == [False]
    assert main(["store", "list", "--root", str(tmp_path)]) == 0
    assert "1 results" in capsys.readouterr().out
    made: list[str] = []
    make(tmp_path, resume=True, made=made)
    assert made == list(NAMES)  # nothing says which of them are whole
    assert "manifest.json: not a readable manifest" in capsys.readouterr().err
    assert main(["store", "prune", "--root", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("maps/*/"))


@pytest.mark.parametrize("name", NAMES)
def test_what_kept_its_size_is_found_by_reading(tmp_path: Path, capsys, name: str) -> None:
    stage = make(tmp_path, resume=True, made=[])
    assert main(["store", "verify", "--root", str(tmp_path)]) == 0
    assert "1 results read, 0 damaged" in capsys.readouterr().out
    path = stage.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert not damage(stage.folder)
    with pytest.raises(SystemExit) as ended:
        main(["store", "verify", "--root", str(tmp_path)])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == f"{path}: altered\n"
    assert "1 damaged and deleted" in printed.out
    made: list[str] = []
    make(tmp_path, resume=True, made=made)
    assert made == list(NAMES)


def test_what_a_killed_process_was_writing_is_no_part_of_the_result(tmp_path: Path) -> None:
    partial = Stage(tmp_path, "maps", {"k": 4}).folder.with_suffix(".partial")
    (partial / "deep").mkdir(parents=True)
    for name in (".a.npz.4711", "deep/.c.json.4711"):
        (partial / name).write_bytes(b"half")
    stage = make(tmp_path, resume=True, made=[])
    files = {p.relative_to(stage.folder).as_posix() for p in stage.folder.rglob("*.*")}
    assert files == {*NAMES, "manifest.json"}


def test_what_a_run_is_making_is_not_pruned(tmp_path: Path, capsys) -> None:
    make(tmp_path, resume=True, made=[])
    other = Stage(tmp_path, "maps", {"k": 5})
    with other.build() as folder:
        assert folder
        (folder / "a.json").write_text("{}")
        for options in ([], ["--partial"]):
            assert main(["store", "prune", "--root", str(tmp_path), *options]) == 0
        assert (folder / "a.json").is_file()
    assert other.done
    assert [found["folder"] for found in results(tmp_path)] == [other.folder]


def test_what_an_earlier_version_made_is_believed(tmp_path: Path) -> None:
    stage = make(tmp_path, resume=True, made=[])
    path = stage.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["files"].keys() == set(NAMES)
    path.write_text(json.dumps({k: manifest[k] for k in ("stage", "inputs", "seconds")}))
    assert Stage(tmp_path, "maps", {"k": 4}).done
