"""The check program: run as its users run it, and its findings split by split."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.folder import Folder
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.programs.check import check_split
from tests.data.trees import Sample, draw_samples, write_coco, write_folder, write_mask, write_voc

ROOT = Path(__file__).parents[2]
CLASSES = ["cat", "dog", "fox"]


def run(*overrides, cwd):
    """Exit status, stdout and stderr of the program, with the terminal 200 columns wide."""
    done = subprocess.run(
        [sys.executable, "-m", "lpcam.programs.check", *overrides],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def row(table, name):
    """The cells of the first row that begins with a name."""
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells and cells[0] == name:
            return cells[1:]
    raise AssertionError(f"no row {name} in:\n{table}")


@pytest.fixture
def tree(tmp_path):
    splits = {
        "train": [*draw_samples(CLASSES, 7, 0), Sample("bare", Image.new("RGB", (5, 5)))],
        "val": draw_samples(CLASSES, 3, 1, prefix="v"),
    }
    return write_folder(tmp_path / "mine", splits, CLASSES)


def test_a_whole_folder_passes_with_its_counts(tree, tmp_path):
    for name in ("000", "001", "002", "003"):
        (tree / "masks" / f"{name}.png").unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    status, printed, errors = run("dataset=folder", f"dataset.root={tree}", cwd=tmp_path)
    assert (status, errors) == (0, "")
    summary, histogram = printed.split("Pictures that show each class")
    assert row(summary, "train") == ["8", "1", "4", "0", "000, 001, 002, 1 more"]
    assert row(summary, "val") == ["3", "0", "3", "0", ""]
    # Picture n shows class n mod 3, and every other one the class after it too.
    expected = {name: [0, 0] for name in CLASSES}
    for column, count in enumerate((7, 3)):
        for number in range(count):
            for step in range(1 + number % 2):
                expected[CLASSES[(number + step) % 3]][column] += 1
    for name, counts in expected.items():
        assert row(histogram, name) == [str(count) for count in counts]
    assert sorted(path for path in tmp_path.rglob("*")) == before  # it writes nothing


def test_voc_and_coco_are_checked_alike(tmp_path):
    splits = {split: draw_samples(VOC_CLASSES, 4, 0) for split in ("train_aug", "train", "val")}
    voc = write_voc(tmp_path / "voc", splits, VOC_CLASSES)
    status, printed, errors = run("dataset=voc", f"dataset.root={voc}", cwd=tmp_path)
    assert (status, errors) == (0, "")
    for split in splits:
        assert row(printed, split) == ["4", "0", "4", "0", ""]
    splits.pop("train_aug")
    coco = write_coco(tmp_path / "coco", splits, dict(enumerate(VOC_CLASSES, 1)))
    classes = f"+dataset.tree_classes=[{','.join(VOC_CLASSES)}]"
    status, printed, errors = run("dataset=coco", f"dataset.root={coco}", classes, cwd=tmp_path)
    assert status == 0
    assert errors.startswith("train2014: 4 pictures, 0 of them without labels")
    for split in splits:
        assert row(printed, split) == ["4", "0", "4", "0", ""]


def test_every_split_is_checked_and_every_problem_listed(tree, tmp_path):
    (tree / "images" / "v001.jpg").unlink()
    (tree / "images" / "003.jpg").write_bytes(b"nothing")
    Image.new("RGB", (40, 40)).save(tree / "masks" / "004.png")
    write_mask(tree / "masks" / "005.png", np.zeros((1, 2), np.uint8))
    status, printed, errors = run("dataset=folder", f"dataset.root={tree}", cwd=tmp_path)
    assert status == 1
    assert row(printed, "train")[3] == "3"
    assert row(printed, "val") == ["0", "0", "0", "1", ""]
    lines = errors.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 4
    for line, words in zip(
        lines,
        [
            "003.jpg: not a readable image",
            "004.png: mask of mode RGB; save class numbers",
            "mask of 2x1; give it its own mask",
            "images lacks 1 of 3 files (v001.jpg)",
        ],
        strict=True,
    ):
        assert words in line


def test_a_data_set_that_is_generated_is_built_first(tmp_path):
    settings = ("dataset.train=4", "dataset.val=3", "dataset.sizes=[48]", f"paths.root={tmp_path}")
    status, printed, _ = run("dataset=shapes", *settings, cwd=tmp_path)
    assert status == 0
    assert row(printed, "train") == ["4", "0", "4", "0", ""]
    assert row(printed, "val") == ["3", "0", "3", "0", ""]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=folder"], "root"),
        (["dataset=folder", "dataset.root=nowhere"], "classes.txt"),
        (["dataset=voc", "dataset.root=nowhere"], "dataset.root must be the folder VOC2012"),
        (["dataset=coco", "dataset.root=nowhere"], "check dataset.root, dataset.year"),
        (["dataset=vok"], "vok"),
    ],
)
def test_a_wrong_root_or_name_ends_with_lines_and_no_traceback(tmp_path, overrides, words):
    status, _, errors = run(*overrides, cwd=tmp_path)
    assert status == 1
    assert words in errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: ")


def test_many_problems_of_a_split_are_counted(tree, tmp_path):
    for path in (tree / "images").glob("00*.jpg"):
        path.write_bytes(b"nothing")
    status, _, errors = run("dataset=folder", f"dataset.root={tree}", cwd=tmp_path)
    assert status == 1
    lines = errors.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "error: train: 2 more problems like these"


def test_what_was_found_can_be_read_by_a_program(tree):
    (tree / "masks" / "002.png").unlink()
    (tree / "masks" / "004.png").write_bytes(b"nothing")
    found = check_split(Folder(tree), "train")
    assert (found.pictures, found.unlabelled, found.masks) == (8, 1, 6)
    assert found.without_mask == ["002"]
    assert found.histogram.sum() == 10  # three of the first seven pictures show two objects
    (problem,) = found.problems
    assert "004.png: not a readable image" in problem
