"""The same run again: what is done is not repeated, and what has changed is not believed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from lpcam.__main__ import main
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.programs.done import _files
from lpcam.stages.classifier import classifier_stage
from lpcam.storage.store import Stage
from lpcam.sweeps.jobs import read_jobs
from tests import golden
from tests.conftest import ROOT, TINY, TINY_INFER, TINY_TRAIN, at


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained classifier, a checkpoint beside the store and a finished run."""
    root = tmp_path_factory.mktemp("again")
    for name, options in (("train", TINY_TRAIN), ("infer", TINY_INFER)):
        command = [sys.executable, f"{name}.py", *TINY, *options, *at(root, name)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to change. Times of files are kept, as the store knows them."""
    shutil.copytree(finished, tmp_path / "root")
    return tmp_path / "root"


def again(program, root: Path, *options: str) -> bool:
    """Run once more in the folder of one's own choice; whether it was done already."""
    outcome = program("infer", *TINY, *TINY_INFER, *options, *at(root, "infer"))
    assert outcome.status == 0, outcome.stderr
    return "Already done" in outcome.stdout


def metrics(root: Path) -> dict[str, float]:
    return json.loads((root / "infer" / "metrics.json").read_text())


def test_the_figures_have_not_moved(finished: Path) -> None:
    """If they had to, write them anew with ``python -m tests.golden`` and say why in CHANGELOG.md.

    Other versions of torch round otherwise; a figure moves by less than this for that.
    """
    found = json.loads((finished / "infer" / "metrics.json").read_text())
    assert found == pytest.approx(json.loads(golden.FILE.read_text()), abs=0.01)
    assert all(np.isfinite(value) for value in found.values())


def test_what_is_done_is_done_once_unless_it_was_deleted(program, root: Path) -> None:
    assert not again(program, root)  # its data lies elsewhere than when it was finished
    assert again(program, root)
    for gone in ("masks/val_00003.png", "maps/train_00002.npz", "report.html"):
        before = (root / "infer" / gone).read_bytes()
        (root / "infer" / gone).unlink()
        assert not again(program, root)
        assert len((root / "infer" / gone).read_bytes()) == pytest.approx(len(before), rel=0.05)
    assert again(program, root)


@pytest.mark.parametrize("name", ["DONE.json", "metrics.json", "config.yaml"])
def test_a_record_that_was_edited_is_not_believed(program, root: Path, name: str) -> None:
    again(program, root)
    before = metrics(root)
    path = root / "infer" / name
    text = path.read_text()
    value = str(before["val/lpcam/miou"]) if name != "config.yaml" else "0.3"
    assert value in text
    path.write_text(text.replace(value, "0.99"))
    assert read_jobs(root)[0].status == ("failed" if name == "DONE.json" else "done")
    assert not again(program, root)
    assert metrics(root) == before
    assert again(program, root)


@pytest.mark.parametrize("what", ["mask", "picture"])
def test_other_data_is_looked_at_anew(program, root: Path, what: str) -> None:
    (tree,) = root.glob("data/shapes/seed0-*[0-9a-f]")
    (checkpoint,) = root.glob("store/classifier/*/last.ckpt")
    shutil.copytree(tree, root / "mine")
    options = (
        "dataset=voc",
        f"dataset.root={root / 'mine'}",
        "+dataset.classes=[ringhead,stripehead,spothead,checkhead]",
        *(f"dataset.{name}_split=train" for name in ("train", "prototype")),
        "dataset.map_splits=[val]",
        f"ckpt={checkpoint}",
        *(option for option in (*TINY, *TINY_INFER) if not option.startswith("dataset")),
        "report=false",
        *at(root, "voc"),
    )

    def done() -> bool:
        outcome = program("infer", *options)
        assert outcome.status == 0, outcome.stderr
        return "Already done" in outcome.stdout

    assert not done()
    assert done()
    before = (root / "voc" / "metrics.json").read_text()
    if what == "mask":
        path = root / "mine" / "SegmentationClass" / "val_00000.png"
        mask = Image.open(path)
        other = Image.fromarray(np.where(np.asarray(mask) > 0, 0, 1).astype(np.uint8))
        other.putpalette(mask.getpalette() or [])
    else:
        path = root / "mine" / "JPEGImages" / "val_00000.jpg"
        other = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other.save(path)
    assert not done()
    assert (root / "voc" / "metrics.json").read_text() != before


def test_touched_pictures_are_said_to_be_the_reason(program, root: Path) -> None:
    (tree,) = root.glob("data/shapes/seed0-*[0-9a-f]")
    (checkpoint,) = root.glob("store/classifier/*/last.ckpt")
    program("train", *TINY, *TINY_TRAIN, *at(root, "train"))  # its data lies elsewhere than before
    (tree / "JPEGImages" / "train_00003.jpg").touch()
    outcome = program("infer", *TINY, *TINY_INFER, *at(root, "touched"))
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert "or were touched" in line
    (given,) = re.findall(r"give (ckpt=\S+);", line)
    assert given == f"ckpt={checkpoint}"
    assert "train it first:  python train.py" in line
    outcome = program("infer", *TINY, *TINY_INFER, given, "report=false", *at(root, "touched"))
    assert outcome.status == 0, outcome.stderr


def test_another_checkpoint_under_the_same_name(program, root: Path) -> None:
    (stored,) = root.glob("store/classifier/*/last.ckpt")
    given = root / "mine.ckpt"
    shutil.copyfile(stored, given)
    ckpt = f"ckpt={given}"
    again(program, root, ckpt)
    assert again(program, root, ckpt)
    state = torch.load(given, weights_only=True)
    weight = state["state_dict"]["head.weight"]
    weight *= torch.linspace(0.8, 1.2, weight.shape[1])
    torch.save(state, given)
    before = metrics(root)
    assert not again(program, root, ckpt)
    assert metrics(root) != before


def test_nothing_of_an_earlier_run_stays(program, root: Path) -> None:
    output = root / "infer"
    assert not again(program, root, "refiner=par")
    (output / "notes.txt").write_text("the user's")
    assert not again(program, root, "dataset.map_splits=[val]", "report=false")
    assert {path.stem[:3] for path in (output / "maps").iterdir()} == {"val"}
    assert {path.stem[:3] for path in (output / "masks").iterdir()} == {"val"}
    assert not list((output / "refined").glob("*"))
    assert not (output / "report.html").exists()
    assert not list((output / "figures").glob("*"))
    assert (output / "notes.txt").read_text() == "the user's"
    assert all(key.startswith("val/") for key in metrics(root))


def test_a_folder_that_is_no_run_keeps_its_files(program, root: Path) -> None:
    output = root / "mine"
    (output / "masks").mkdir(parents=True)
    (output / "masks" / "own.png").write_bytes(b"mine")
    (output / "config.yaml").write_text("mine: true\n")
    outcome = program("infer", *TINY, *TINY_INFER, "report=false", *at(root, "mine"))
    assert outcome.status == 0, outcome.stderr
    assert (output / "masks" / "own.png").read_bytes() == b"mine"


def test_a_run_s_files_are_not_the_store_s(program, root: Path) -> None:
    again(program, root)
    stored = {path: path.read_bytes() for path in root.glob("store/maps/*/*.tar")}
    assert stored
    with (root / "infer" / "maps" / "val_00000.npz").open("r+b") as file:
        file.write(b"overwritten in place")
    assert stored == {path: path.read_bytes() for path in stored}


def test_an_output_folder_that_is_not_there(program, root: Path) -> None:
    output = root / "new" / "folder"
    options = (f"paths.output={output}", "logger=csv", "report=false")
    outcome = program("infer", *TINY, *TINY_INFER, *options, *at(root, "infer"))
    assert outcome.status == 0, outcome.stderr
    assert (output / "DONE.json").is_file()
    assert (output / "csv" / "metrics.csv").is_file()


def test_a_sweep_into_one_folder_is_refused(program, root: Path) -> None:
    options = ("prototypes.k=2,3", f"paths.output={root / 'one'}", "report=false")
    folders = (f"paths.root={root}", f"hydra.sweep.dir={root / 'sweep'}")
    outcome = program("infer", "-m", *TINY, *TINY_INFER[:3], *options, *folders)
    assert outcome.status == 1
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert all("one folder for all jobs" in line and "hydra.sweep.dir" in line for line in lines)
    assert not (root / "one").exists()


def test_a_sweep_s_job_gets_its_report_when_it_is_wanted(program, root: Path, capsys) -> None:
    folders = (f"paths.root={root}", f"hydra.sweep.dir={root / 'sweep'}")
    sweep = ("-m", *TINY, *TINY_INFER, "prototypes.use=both,class", *folders)
    assert program("infer", *sweep).status == 0
    job, other = (path.parent for path in sorted(root.glob("sweep/*/DONE.json")))
    assert not (job / "report.html").exists()
    before = {name: (job / name).read_bytes() for name in ("metrics.json", ".hydra/overrides.yaml")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lpcam"])
        GlobalHydra.instance().clear()
        assert main(["report", str(job)]) == 0

    assert (job / "report.html").stat().st_size > 1000
    assert not (other / "report.html").exists()
    assert before == {name: (job / name).read_bytes() for name in before}
    assert program("infer", *sweep).stdout.count("Already done") == 2
    capsys.readouterr()
    assert main(["report", str(root / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_trained_classifier_gives_its_metrics_to_every_run(program, root: Path) -> None:
    outcome = program("train", *TINY, *TINY_TRAIN, *at(root, "another"))
    assert outcome.status == 0, outcome.stderr
    assert "Already trained" in outcome.stdout
    written = [(root / name / "metrics.json").read_text() for name in ("train", "another")]
    assert written[0] == written[1]
    assert "val/map" in json.loads(written[0])


def test_what_a_stage_is_known_by(tmp_path: Path) -> None:
    """Precision, and the version of a formula, make another result."""
    backbone = build_backbone("test_resnet", None)
    host = Classifier(backbone, 3)
    keys = {host.feature_key}
    host.precision = "bf16-mixed"
    keys.add(host.feature_key)
    assert len(keys) == 2

    class Empty:
        train_split = "train"
        classes = ("a", "b", "c")

        def pictures(self, split: str) -> list[object]:
            return []

    stages = {
        classifier_stage(tmp_path, Empty(), backbone, {}, seed=0, precision=precision).key  # type: ignore[arg-type]
        for precision in ("32-true", "bf16-mixed")
    }
    assert len(stages) == 2
    assert Stage(tmp_path, "maps", {}).key == Stage(tmp_path, "maps", {}, version=1).key
    assert Stage(tmp_path, "maps", {}).key != Stage(tmp_path, "maps", {}, version=2).key


@pytest.mark.parametrize("stage", ["features", "centers", "maps", "scores"])
def test_a_file_of_the_store_that_was_cut_is_made_again(program, root: Path, stage: str) -> None:
    before = metrics(root)
    (root / "infer" / "DONE.json").unlink()
    harmed = [
        max(folder.iterdir(), key=lambda file: (file.name != "manifest.json", file.name))
        for folder in (root / "store" / stage).glob("*/")
    ]
    for path in harmed:
        path.write_bytes(path.read_bytes()[:-20])
    outcome = program("infer", *TINY, *TINY_INFER, *at(root, "infer"))
    assert outcome.status == 0, outcome.stderr
    assert harmed
    assert "Traceback" not in outcome.stderr
    assert "made again" in outcome.stderr
    assert metrics(root) == pytest.approx(before)


def test_a_folder_is_looked_at_whatever_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("saliency", "lpcam"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    given = {"folder": "saliency", "source": "lpcam", "powers": ["none", 2]}
    assert list(_files(given)) == [Path("saliency/a.png")]
