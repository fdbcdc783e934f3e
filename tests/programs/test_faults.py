"""What is wrong with files, disks and data ends in one line that names it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpcam.data.folder import Folder
from lpcam.programs.check import check_split, main
from lpcam.storage.store import verify
from tests.conftest import Outcome, at
from tests.data.trees import draw_samples, write_folder

CLASSES = ["cat", "dog"]
QUICK = (
    "dataset=folder",
    "backbone=timm",
    "backbone.name=test_resnet",
    "backbone.weights=null",
    "classifier.epochs=2",
    "trainer=cpu",
    "logger=none",
    "num_workers=0",
)
INFER = (
    "prototypes.k=1",
    "prototypes.allow_missing=true",
    "inference.scales=[1.0]",
    "dataset.map_splits=[val]",
    "thresholds.class_score=0",
    "report=false",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    splits = {
        "train": draw_samples(CLASSES, 4, 0, sizes=(64,)),
        "val": draw_samples(CLASSES, 2, 1, sizes=(64,), prefix="v"),
    }
    return write_folder(tmp_path / "mine", splits, CLASSES)


def no_mask(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path)


def only_line(outcome: Outcome) -> str:
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``lpcam check`` in this process."""
    from hydra.core.global_hydra import GlobalHydra

    def call(*overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["check", *overrides])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        GlobalHydra.instance().clear()
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    yield call
    os.environ.pop("HYDRA_FULL_ERROR", None)
    GlobalHydra.instance().clear()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a disk of some kB, if this user may."""
    mounted: list[Path] = []

    def mount(kilobytes: int, options: str = "rw") -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,{options}", "none", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("break_it", [break_link, make_folder])
def test_a_picture_that_is_no_file_is_named(
    program: Any, check: Any, tree: Path, tmp_path: Path, break_it: Any
) -> None:
    picture = tree / "images" / "v000.jpg"
    break_it(picture)
    line = only_line(check("dataset=folder", f"dataset.root={tree}"))
    assert f"{picture}: not a readable image" in line
    line = only_line(program("train", *QUICK, f"dataset.root={tree}", *at(tmp_path)))
    assert line.startswith(f"error: {picture}: ")


@pytest.mark.parametrize("break_it", [break_link, make_folder, no_mask])
def test_a_mask_that_is_none_is_named(
    program: Any, check: Any, tree: Path, tmp_path: Path, break_it: Any
) -> None:
    mask = tree / "masks" / "v000.png"
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path))
    assert program("train", *settings).status == 0
    break_it(mask)
    assert f"{mask}: " in only_line(check("dataset=folder", f"dataset.root={tree}"))
    assert only_line(program("infer", *settings, *INFER)).startswith(f"error: {mask}: ")


@pytest.mark.parametrize("lines", ["cat\n", "cat\ncat\n", "a cat\ndog\n", ""])
def test_bad_classes_are_told_once(
    program: Any, check: Any, tree: Path, tmp_path: Path, lines: str
) -> None:
    (tree / "classes.txt").write_text(lines)
    for outcome in (
        check("dataset=folder", f"dataset.root={tree}"),
        program("train", *QUICK, f"dataset.root={tree}", *at(tmp_path)),
        program("infer", *QUICK, f"dataset.root={tree}", *at(tmp_path)),
    ):
        assert str(tree / "classes.txt") in only_line(outcome)


def test_check_warns_of_pictures_that_want_to_be_turned(check: Any, tree: Path) -> None:
    for number, orientation in ((0, 6), (1, 1), (2, 3)):
        path = tree / "images" / f"00{number}.jpg"
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.copy().save(path, exif=exif)
    damaged = tree / "images" / "003.jpg"
    with Image.open(damaged) as image:
        image.copy().save(damaged, exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    outcome = check("dataset=folder", f"dataset.root={tree}")
    assert outcome.status == 0
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("warning: train: 2 pictures have an EXIF orientation (000, 002); it is ")
    assert check_split(Folder(tree), "train").turned == ["000", "002"]


def test_broken_pictures_are_left_out_and_come_back_when_they_are_mended(
    program: Any, tree: Path, tmp_path: Path
) -> None:
    run = (*QUICK, f"dataset.root={tree}", "dataset.on_error=skip", *at(tmp_path))
    infer = [o for o in INFER if not o.startswith("report")]
    whole = {path: path.read_bytes() for path in (tree / "images").iterdir()}
    for name in ("001", "v000"):
        path = tree / "images" / f"{name}.jpg"
        path.write_bytes(whole[path][:300])
    for name, options in (("train", []), ("infer", infer)):
        outcome = program(name, *run, *options)
        assert outcome.status == 0, outcome.stderr
        assert "warning: train: 1 of 4 pictures left out: " in outcome.stderr
        assert "warning: val: 1 of 2 pictures left out: " in outcome.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val/skipped"] == 1
    assert [path.stem for path in (tmp_path / "run" / "maps").iterdir()] == ["v001"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("<td>v000</td>") == report.count("<td>001</td>") == 1
    assert "Already done" in program("infer", *run, *infer).stdout

    for path, data in whole.items():
        path.write_bytes(data)
    for name, options in (("train", []), ("infer", infer)):
        outcome = program(name, *run, *options)
        assert outcome.status == 0, outcome.stderr
        assert "left out" not in outcome.stderr
    assert len(list((tmp_path / "run" / "maps").iterdir())) == 2
    assert "skipped" not in (tmp_path / "run" / "metrics.json").read_text()


def test_a_training_that_diverges_leaves_nothing(program: Any, tree: Path, tmp_path: Path) -> None:
    rates = ("classifier.lr=1e6", "classifier.head_lr_factor=1e6", "classifier.epochs=40")
    for _ in range(2):  # nor does a second try find anything to go on from
        line = only_line(program("train", *QUICK, *rates, f"dataset.root={tree}", *at(tmp_path)))
        assert line.startswith("error: classifier.lr: training diverged in epoch ")
        assert line.endswith("; lower it")
        stage = tmp_path / "store" / "classifier"
        assert not list(stage.rglob("*.ckpt"))
        assert not list(stage.rglob("manifest.json"))


@pytest.mark.parametrize("place", ["paths.store", "paths.output", "paths.data"])
def test_a_file_where_a_folder_should_be(program: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    settings = [o for o in QUICK if not o.startswith("dataset=")]
    line = only_line(
        program("train", "dataset=shapes", "dataset.train=4", "dataset.val=2", *settings,
                *at(tmp_path), f"{place}={tmp_path / 'file'}")
    )  # fmt: skip
    assert line.startswith(f"error: {tmp_path / 'file'}")
    assert "check that it is there" in line or "set paths.data elsewhere" in line


def test_a_read_only_disk(program: Any, small_disk: Any, tree: Path, tmp_path: Path) -> None:
    disk = small_disk(100, "ro")
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path))
    line = only_line(program("train", *settings, f"paths.store={disk}"))
    assert line.startswith(f"error: {disk}/")
    assert "Read-only file system; check that it is there" in line
    assert f"error: {disk}/run: Read-only" in only_line(
        program("train", *settings, f"hydra.run.dir={disk / 'run'}")
    )


def test_a_full_disk(program: Any, small_disk: Any, tree: Path, tmp_path: Path) -> None:
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path))
    assert program("train", *settings).status == 0
    disk = small_disk(100)
    line = only_line(program("train", *settings, f"paths.store={disk}"))
    assert line.startswith(f"error: {disk}")
    assert ": No space left on device; free some space, or set paths.root (data, store)" in line


def test_a_full_disk_costs_nothing_once_there_is_room(
    program: Any, small_disk: Any, tree: Path, tmp_path: Path
) -> None:
    disk = small_disk(700)
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path), f"paths.store={disk}")
    assert "No space left on device" in only_line(program("train", *settings))
    assert not [path for path in disk.rglob(".*") if path.is_file()]
    assert not any(verify(disk).values())
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    for name, options in (("train", ()), ("infer", INFER)):
        outcome = program(name, *settings, *options)
        assert outcome.status == 0, outcome.stderr
    assert not any(verify(disk).values())


def test_a_process_that_decodes_pictures_is_killed(
    program: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does when memory is short."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("lpcam.data.loaders.open_picture", die)
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path), "num_workers=1")
    line = only_line(program("train", *settings))
    assert line.startswith("error: num_workers=1: a process that decodes pictures was killed")


def test_a_library_that_cannot_write(
    program: Any, small_disk: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch and safetensors raise errors of their own."""
    settings = (*QUICK, f"dataset.root={tree}", *at(tmp_path))
    assert program("train", *settings).status == 0
    disk = small_disk(50)

    def save(*_: Any) -> None:
        raise RuntimeError("file write failed")

    monkeypatch.setattr(np, "save", save)
    line = only_line(program("infer", *settings, *INFER, f"paths.output={disk}"))
    assert line.startswith(f"error: {disk}: No space left on device; free some")
