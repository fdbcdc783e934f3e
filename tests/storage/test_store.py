import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from pytorch_lightning.utilities import rank_zero_only

import lpcam
from lpcam.__main__ import main
from lpcam.storage.store import Stage

INPUTS = {"k": 12, "tau": 0.1, "upstream": "3f2a", "scales": [1.0, 0.5], "select": {"mu_f": 0.9}}

RANK_NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


@pytest.mark.parametrize(
    "change",
    [
        {"k": 13},
        {"tau": 0.1000001},
        {"upstream": "3f2b"},
        {"scales": [0.5, 1.0]},
        {"select": {"mu_f": 0.8}},
        {"select": {"mu_b": 0.9}},
        {"k": None},
        {"new": 0},
    ],
)
def test_any_change_changes_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    key = Stage(tmp_path, "maps", INPUTS).key
    assert Stage(tmp_path, "maps", {**INPUTS, **change}).key != key


def test_key_depends_on_name_but_not_on_order_or_place(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "maps", INPUTS)
    backwards = dict(reversed(list(INPUTS.items())))
    assert Stage(tmp_path / "other", "maps", backwards).key == stage.key
    assert Stage(tmp_path, "features", INPUTS).key != stage.key
    assert Stage(tmp_path, "maps", INPUTS, version=2).key != stage.key


def test_a_stage_is_built_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "maps", INPUTS)
    assert not stage.done
    with stage.build() as folder:
        assert folder is not None
        (folder / "result.txt").write_text("42")
        assert not stage.done
    again = Stage(tmp_path, "maps", INPUTS)
    assert again.done
    with again.build() as nothing:
        assert nothing is None
    assert (again.folder / "result.txt").read_text() == "42"
    assert again.manifest["stage"] == "maps"
    assert again.manifest["inputs"] == {**INPUTS, "version": 1}
    assert again.manifest["seconds"] >= 0


@pytest.mark.parametrize("resume", [True, False])
def test_a_body_that_raises_leaves_nothing_done(tmp_path: Path, resume: bool) -> None:
    stage = Stage(tmp_path, "maps", INPUTS)

    def fail_half_way() -> None:
        with stage.build() as folder:
            assert folder is not None
            (folder / "first.txt").write_text("kept")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert not stage.done
    assert not stage.folder.exists()

    with stage.build(resume=resume) as folder:
        assert folder is not None
        assert [path.name for path in folder.iterdir()] == (["first.txt"] if resume else [])
    assert stage.done


def test_other_ranks_fill_the_folder_that_rank_0_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, "maps", INPUTS)
    with stage.build(together=True) as rank_0:
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with Stage(tmp_path, "maps", INPUTS).build(together=True) as rank_1:
            assert rank_1 == rank_0
            assert rank_1 is not None
            (rank_1 / "from_rank_1.txt").write_text("")
        assert not stage.done
        monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert (stage.folder / "from_rank_1.txt").is_file()


# Builds the stage of argv[1]; argv[2] names this process. Reports itself by creating files, and
# computes until it is told to stop.
BUILDER = """
import sys, time
from pathlib import Path
from lpcam.storage.store import Stage

root, name = Path(sys.argv[1]), sys.argv[2]
(root / f"{name}.started").touch()
with Stage(root / "store", "maps", {"k": 1}).build(resume=True) as folder:
    if folder is not None:
        (folder / f"{name}.txt").touch()
        (root / f"{name}.computing").touch()
        while not (root / "release").exists():
            time.sleep(0.01)
print("reused" if folder is None else "computed")
"""


Process: TypeAlias = "subprocess.Popen[str]"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    environment = {key: value for key, value in os.environ.items() if key not in RANK_NAMES}
    environment["PYTHONPATH"] = str(Path(lpcam.__file__).parents[1])
    processes = []

    def start_builder(name: str) -> Process:
        command = [sys.executable, "-c", BUILDER, str(tmp_path), name]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
        return processes[-1]

    yield start_builder
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: Process) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


def test_two_processes_compute_a_stage_once(
    tmp_path: Path, start: Callable[[str], Process]
) -> None:
    first = start("first")
    wait_for(tmp_path / "first.computing", first)
    second = start("second")
    wait_for(tmp_path / "second.started", second)
    time.sleep(0.2)  # lets the second reach the lock; without it the test only checks less
    assert not (tmp_path / "second.computing").exists()
    (tmp_path / "release").touch()
    assert first.communicate(timeout=60)[0].strip() == "computed"
    assert second.communicate(timeout=60)[0].strip() == "reused"
    assert (first.returncode, second.returncode) == (0, 0)


def test_a_killed_process_leaves_the_lock_free_and_the_stage_undone(
    tmp_path: Path, start: Callable[[str], Process]
) -> None:
    victim = start("victim")
    wait_for(tmp_path / "victim.computing", victim)
    victim.kill()
    victim.communicate(timeout=60)
    stage = Stage(tmp_path / "store", "maps", {"k": 1})
    assert not stage.done

    (tmp_path / "release").touch()
    heir = start("heir")
    assert heir.communicate(timeout=60)[0].strip() == "computed"
    assert stage.done
    assert (stage.folder / "victim.txt").exists()  # resume=True keeps what was there


def test_a_store_lists_what_it_holds_and_frees_it(tmp_path: Path, capsys) -> None:
    for name, k, size in (("maps", 4, 3_000_000), ("maps", 8, 1_000_000), ("scores", 4, 0)):
        with Stage(tmp_path, name, {"k": k}).build() as folder:
            assert folder is not None
            (folder / "data").write_bytes(bytes(size))
    (tmp_path / "maps" / "beef.partial").mkdir()
    (tmp_path / "maps" / "beef.partial" / "data").write_bytes(bytes(500_000))
    root = ["--root", str(tmp_path)]

    assert main(["store", "list", *root]) == 0
    printed = capsys.readouterr().out
    assert "k=8" in printed
    assert "4 results, 4.5 MB" in printed

    assert main(["store", "prune", "--partial", *root]) == 0
    assert "0.5 MB freed" in capsys.readouterr().out
    assert main(["store", "prune", "--days", "1", *root]) == 0
    assert "0.0 MB freed" in capsys.readouterr().out
    assert main(["store", "prune", "--stage", "maps", *root]) == 0
    assert "4.0 MB freed" in capsys.readouterr().out
    assert Stage(tmp_path, "scores", {"k": 4}).done
    assert not Stage(tmp_path, "maps", {"k": 4}).done


def test_a_store_that_is_not_there_is_named(tmp_path: Path, capsys) -> None:
    assert main(["store", "list", "--root", str(tmp_path / "none")]) == 1
    assert "none: no such store" in capsys.readouterr().err
