"""The command ``lpcam`` as its users start it: from a checkout, and from a wheel."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lpcam.__main__ import main
from tests.conftest import ROOT, TINY, TINY_INFER, at

COMMANDS = ("train", "infer", "check", "explain", "demo", "store", "summary")
# Counts what a process has imported when it ends, however it ends.
IMPORTS = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sorted(sys.modules), file=sys.stderr))
"""


def run(
    *arguments: str, cwd: Path = ROOT, code: str | None = None, package: Path = ROOT
) -> tuple[int, str, str, set[str]]:
    """Status, stdout and stderr of ``python -m lpcam`` or of code, and the modules imported."""
    if code is None:
        code = "import runpy; runpy.run_module('lpcam', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(package), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    errors, _, imported = done.stderr.rpartition("IMPORTED ")
    return done.returncode, done.stdout, errors, {name.split(".")[0] for name in imported.split()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    status, _, _, imported = run(code="import lpcam")
    assert status == 0
    assert "lpcam" in imported
    assert not imported & {"torch", "hydra", "omegaconf", "wandb", "pytorch_lightning", "numpy"}


def test_help_lists_all_commands_at_once() -> None:
    status, printed, errors, imported = run("--help")
    assert (status, errors) == (0, "")
    lines = [line.split()[0] for line in printed.splitlines() if line.startswith("    ")]
    assert tuple(line for line in lines if line in COMMANDS) == COMMANDS
    assert not imported & {"torch", "hydra", "omegaconf", "wandb", "timm", "numpy"}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "train",
            (
                "backbone: deit_small, efficientnet_lite0",
                "frozen",
                "cutouts",
                "recipe",
                "epochs: 50",
            ),
        ),
        ("infer", ("refiner: crf, irn", "cutouts", "thresholds", "k: 12")),
        ("check", ("dataset: coco, cutouts", "root: ???")),
    ],
)
def test_help_of_a_program_shows_its_groups_without_torch(
    program: str, words: tuple[str, ...]
) -> None:
    status, printed, errors, imported = run(program, "--help")
    assert (status, errors) == (0, "")
    for word in words:
        assert word in printed
    assert "hydra" in imported
    assert not imported & {"torch", "timm", "pytorch_lightning", "wandb"}


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("--nonsense",), ("summary",), ("store", "burn"), ("explain", "--modle=a")],
    ids=" ".join,
)
def test_a_wrong_command_ends_with_status_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: lpcam" in printed.err
    assert "Traceback" not in printed.err


def test_a_wrong_command_of_a_process_ends_with_status_2_at_once() -> None:
    status, printed, errors, imported = run("nonsense")
    assert (status, printed) == (2, "")
    assert "invalid choice: 'nonsense'" in errors
    assert not imported & {"torch", "hydra"}


def test_a_mistyped_override_ends_with_one_line_and_status_1() -> None:
    status, printed, errors, imported = run("infer", "prototypes.kk=3")
    assert (status, printed) == (1, "")
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert "prototypes.kk" in line
    assert "torch" not in imported


def test_check_is_a_command_too(tmp_path: Path) -> None:
    settings = ("dataset=shapes", "dataset.train=4", "dataset.val=3", "dataset.sizes=[48]")
    status, printed, errors, _ = run("check", *settings, f"paths.root={tmp_path}", cwd=tmp_path)
    assert (status, errors.strip()) == (0, "")
    assert "Pictures that show each class" in printed
    status, _, errors, _ = run("check", "dataset=voc", "dataset.root=nowhere", cwd=tmp_path)
    assert status == 1
    assert "dataset.root must be the folder VOC2012" in errors


@pytest.mark.slow
def test_the_command_gives_what_the_script_gives(program, tmp_path: Path) -> None:
    short = ("classifier.epochs=20", "classifier.validate_every=10", "classifier.batch_size=8")
    options = (*TINY, *TINY_INFER, *short, "report=false")
    status, printed, errors, _ = run("train", *TINY, *short, *at(tmp_path, "train"))
    assert status == 0, errors
    assert "Trained: " in printed

    # From another folder, and with nothing of the store left but the classifier.
    status, _, errors, _ = run("infer", *options, *at(tmp_path, "command"), cwd=tmp_path)
    assert status == 0, errors
    for name in ("features", "centers", "maps", "views", "scores"):
        (tmp_path / "store" / name).rename(tmp_path / f"old-{name}")
    outcome = program("infer", *options, *at(tmp_path, "script"))
    assert outcome.status == 0, outcome.stderr

    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("command", "script")
    )
    assert first == second
    assert "val/lpcam/miou" in first
    again = run("infer", *options, *at(tmp_path, "command"))
    assert "Already done" in again[1]


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout, without a network where hatchling is at hand."""
    uv = Path(sys.executable).with_name("uv")
    if importlib.util.find_spec("hatchling"):
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        command += ["--wheel-dir", str(folder), str(ROOT)]
    elif uv.is_file():
        command = [str(uv), "build", "--wheel", "--out-dir", str(folder), str(ROOT)]
    else:
        pytest.skip("neither hatchling nor uv is installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if done.returncode and "Failed to resolve requirements from `build-system" in done.stderr:
        pytest.skip("hatchling can neither be found nor fetched")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_has_its_configs_and_studies(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path / "dist")) as wheel:
        wheel.extractall(tmp_path / "site")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("conf", "experiments"):
        found = {p.relative_to(site / "lpcam") for p in (site / "lpcam" / name).rglob("*.*")}
        kept = [p for kind in ("yaml", "txt") for p in (ROOT / name).rglob(f"*.{kind}")]
        # What is tried on clusters takes a checkout.
        assert found == {p.relative_to(ROOT) for p in kept if p.parent.name != "cluster"}
    packed = {p.relative_to(site) for p in (site / "lpcam").rglob("*.py")}
    assert packed == {p.relative_to(ROOT) for p in (ROOT / "lpcam").rglob("*.py")}
    assert {p.name for p in site.iterdir()} == {"lpcam", *(p.name for p in site.glob("*-info"))}

    where = run(code="import lpcam; print(lpcam.__file__)", cwd=elsewhere, package=site)
    assert where[1].strip() == str(site / "lpcam" / "__init__.py")
    for program in ("train", "infer"):
        options = ("dataset=shapes", "experiments=seeds", "--cfg", "job")
        status, printed, errors, _ = run(program, *options, cwd=elsewhere, package=site)
        assert (status, errors) == (0, "")
        expected = run(program, *options)
        assert yaml.safe_load(printed) == yaml.safe_load(expected[1])
        assert yaml.safe_load(printed)["dataset"]["_target_"] == "lpcam.data.shapes.Shapes"
    assert list(elsewhere.iterdir()) == []
