"""Records in shards: round trips, what a killed process leaves, several writers."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpcam.__main__ import main
from lpcam.storage.arrays import read_arrays, stored_record
from lpcam.storage.records import Records
from lpcam.storage.store import Stage, damage
from tests.conftest import ROOT, unpacked

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1)


@given(st.lists(st.dictionaries(NAMES, st.binary(max_size=2000), max_size=6), max_size=4))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(tmp_path_factory, rounds: list[dict[str, bytes]]) -> None:
    folder = tmp_path_factory.mktemp("records")
    expected: dict[str, bytes] = {}
    for written in rounds:  # of one process after the other
        records = Records(folder)
        for name, data in written.items():
            if name not in records:
                records.write(name, data)
                expected[name] = data
        for name, data in expected.items():
            assert name in records
            assert records.read(name) == data
    assert unpacked(folder) == expected
    assert "other.npz" not in Records(folder) or "other.npz" in expected


def test_files_of_their_own_are_records_too(tmp_path: Path) -> None:
    (tmp_path / "old.npz").write_bytes(b"old")
    records = Records(tmp_path)
    assert "old.npz" in records
    assert records.read("old.npz") == b"old"
    with pytest.raises(FileNotFoundError):
        records.read("none.npz")


def test_an_open_record_can_be_sought_in(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write("before", b"x" * 700)
    records.write("one", bytes(range(200)))
    records.write("after", b"y" * 700)
    with records.open("one") as file:
        assert file.read(3) == b"\0\1\2"
        assert file.seek(-2, os.SEEK_END) == 198
        assert file.read() == bytes([198, 199])
        assert file.read() == b""
        assert file.seek(50) == file.tell() == 50
        file.seek(10, os.SEEK_CUR)
        assert file.read(1) == bytes([60])
        assert file.seek(500) == 500
        assert file.read() == b""


def test_one_array_of_an_archive_is_read_alone(tmp_path: Path) -> None:
    records = Records(tmp_path)
    np.savez(tmp_path / "file.npz", small=np.arange(3), large=np.zeros(10**6))
    records.write("a.npz", (tmp_path / "file.npz").read_bytes())
    with stored_record(records, "a.npz") as file:
        assert read_arrays(file, "small")["small"].tolist() == [0, 1, 2]
    with records.open("a.npz") as file, ZipFile(file) as archive:
        assert archive.namelist() == ["small.npy", "large.npy"]


def test_threads_write_and_read_at_a_time(tmp_path: Path) -> None:
    records = Records(tmp_path)
    wrong = []

    def work(thread: int) -> None:
        for index in range(50):
            data = f"{thread} {index} ".encode() * (index + 1)
            records.write(f"{thread}-{index}", data)
            if records.read(f"{thread}-{index}") != data:
                wrong.append((thread, index))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(unpacked(tmp_path)) == 300
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_threads_read_at_a_time_what_none_has_read_before(tmp_path: Path) -> None:
    written = Records(tmp_path)
    for index in range(200):
        written.write(str(index), str(index).encode() * 1000)
    for _ in range(20):
        records, begin = Records(tmp_path), threading.Barrier(8)
        wrong = []

        def read(thread: int, records=records, begin=begin, wrong=wrong) -> None:
            begin.wait()
            for index in range(thread, 200, 8):
                if records.read(str(index)) != str(index).encode() * 1000:
                    wrong.append(index)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
        assert not wrong


WRITER = """
import sys
from pathlib import Path
from lpcam.storage.records import Records
records = Records(Path(sys.argv[1]))
for index in range(10**6):
    records.write(f"{sys.argv[2]}-{index}", str(index).encode() * 3000)
    print(index, flush=True)
"""


def test_two_writers_are_killed_and_nothing_half_is_read(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    jobs = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, env=environment)
        for name in ("a", "b")
    ]
    last = {}
    for name, job in zip(("a", "b"), jobs, strict=True):
        assert job.stdout
        for _ in range(20):
            last[name] = int(job.stdout.readline())
        job.send_signal(signal.SIGKILL)
        job.wait()
        job.stdout.close()
    records = Records(tmp_path)
    for name, index in last.items():
        for number in range(index + 1):
            assert records.read(f"{name}-{number}") == str(number).encode() * 3000


@pytest.mark.parametrize("torn", [1, 100, 511, 512, 700, 1500])
def test_what_was_being_written_is_cut_off_when_the_stage_is_finished(
    tmp_path: Path, torn: int
) -> None:
    stage = Stage(tmp_path, "maps", {"k": 1})
    data = io.BytesIO()
    np.savez(data, maps=np.arange(50))
    with contextlib.suppress(KeyboardInterrupt), stage.build(resume=True) as folder:
        assert folder
        Records(folder).write("a.npz", data.getvalue())
        (shard,) = folder.glob("*.tar")
        record = shard.read_bytes()
        with shard.open("ab") as file:
            file.write(record[:torn].replace(b"a.npz", b"b.npz"))
        (folder / "1-killed.tar").write_bytes(record[:torn])  # before its first line
        (folder / "1-killed.index").touch()
        raise KeyboardInterrupt
    with stage.build(resume=True) as folder:
        assert folder
        assert "b.npz" not in Records(folder)
        Records(folder).write("b.npz", data.getvalue())
    assert unpacked(stage.folder) == dict.fromkeys(("a.npz", "b.npz"), data.getvalue())
    assert not (stage.folder / "1-killed.tar").exists()
    assert not damage(stage.folder, read=True)


@pytest.mark.parametrize("ending", [".tar", ".index"])
def test_of_what_was_cut_the_whole_records_stay(tmp_path: Path, ending: str, capsys) -> None:
    made: list[int] = []

    def make() -> Stage:
        stage = Stage(tmp_path, "views", {"k": 1})
        with stage.build(resume=True) as folder:
            records = Records(folder) if folder else None
            for index in range(8) if records else ():
                if f"{index}.bin" not in records:
                    records.write(f"{index}.bin", bytes([index]) * 1000)
                    made.append(index)
        return stage

    stage = make()
    (path,) = stage.folder.glob(f"*{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    made.clear()
    again = make()
    assert 0 < len(made) < 8
    assert made == list(range(8 - len(made), 8))
    assert all(again.records.read(f"{i}.bin") == bytes([i]) * 1000 for i in range(8))
    assert f"{path}: " in capsys.readouterr().err
    assert not damage(again.folder)


def test_an_altered_shard_is_found_by_reading(tmp_path: Path, capsys) -> None:
    stage = Stage(tmp_path, "maps", {"k": 1})
    with stage.build() as folder:
        assert folder
        np.savez(tmp_path / "a.npz", maps=np.arange(500))
        Records(folder).write("a.npz", (tmp_path / "a.npz").read_bytes())
    assert main(["store", "verify", "--root", str(tmp_path)]) == 0
    (shard,) = stage.folder.glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert not damage(stage.folder)
    with pytest.raises(SystemExit):
        main(["store", "verify", "--root", str(tmp_path)])
    assert f"{shard}: altered" in capsys.readouterr().err


def test_a_shard_of_text_is_sound_until_it_is_cut(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "instances", {"k": 1})
    with stage.build() as folder:
        assert folder
        for name, text in (("a.json", '[{"label": 3}]'), ("b.json", "[]")):
            Records(folder).write(name, text.encode())
    assert main(["store", "verify", "--root", str(tmp_path)]) == 0
    shard = next(path for path in stage.folder.glob("*.tar") if b"label" in path.read_bytes())
    shard.write_bytes(shard.read_bytes().replace(b'"label"', b'"label '))
    with pytest.raises(SystemExit):
        main(["store", "verify", "--root", str(tmp_path)])


@pytest.mark.parametrize("full", [".tar", ".index"])
def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch, full: str) -> None:
    records = Records(tmp_path)
    records.write("first", b"1" * 5000)
    (shard,) = tmp_path.glob("*.tar")
    whole = shard.stat().st_size
    real = Path.open

    class Full:
        """A file on a disk that is full after some bytes."""

        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def tell(self) -> int:
            return self.file.tell()

        def write(self, data: bytes) -> None:
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", **options: int):
        file = real(path, mode, **options)
        return Full(file) if mode == "ab" and path.suffix == full else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        records.write("second", b"2" * 5000)
    assert "second" not in records
    monkeypatch.undo()
    if full == ".tar":
        assert shard.stat().st_size == whole
    records.write("third", b"3")
    assert "second" not in Records(tmp_path)
    assert Records(tmp_path).read("third") == b"3"
    assert Records(tmp_path).read("first") == b"1" * 5000


def test_no_file_stays_open(tmp_path: Path) -> None:
    records = Records(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    records.write("one", b"1")
    assert records.read("one") == b"1"
    assert len(os.listdir("/proc/self/fd")) == before
