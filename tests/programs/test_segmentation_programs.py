"""train.py and infer.py with task=segmentation, from end to end, on tiny data."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.__main__ import main
from lpcam.data.shapes import Shapes
from lpcam.data.voc import CLASSES
from lpcam.seeds.palette import palette
from lpcam.segmentation.file import save_network
from lpcam.segmentation.networks import Architecture, build_network
from tests.conftest import ROOT, TINY, at
from tests.segmentation.test_mask_sources import fake_run

NETWORK = ("backbone=timm", "backbone.name=test_resnet", "backbone.weights=null")
LEARN = (
    "task=segmentation",
    "segmenter.rates=[1,2]",
    "segmenter.lr=0.003",
    "segmenter.steps=8",
    "segmenter.save_every=4",
    "segmenter.batch_size=4",
    "segmenter.crop=96",
    "segmenter.scales=[1.0]",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run whose masks are good, and a network that learnt from them."""
    root = tmp_path_factory.mktemp("segmentation")
    dataset = Shapes(root / "data" / "shapes", train=16, val=8, sizes=(112, 128))
    dataset.prepare()
    run = fake_run(root / "pseudo", dataset)
    for picture in dataset.pictures("val"):
        shutil.copyfile(picture.mask_path, run / "masks" / f"{picture.id}.png")
    command = [sys.executable, "train.py", *TINY, *NETWORK, *LEARN, *at(root, "train")]
    subprocess.run(
        [*command, f"masks={run}"], cwd=ROOT, check=True, capture_output=True, timeout=250
    )
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to break."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def masks(root: Path) -> str:
    return f"masks={root / 'pseudo'}"


def assert_one_line(outcome, *parts: str) -> None:
    assert outcome.status == 1
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_a_network_is_trained_once_and_labels_pictures(program, copied: Path) -> None:
    outcome = program("train", *TINY, *NETWORK, *LEARN, masks(copied), *at(copied))
    assert "Already trained" in outcome.stdout
    run = (*TINY, *NETWORK, *LEARN, masks(copied), *at(copied, "seg"), "segmenter.export=null")
    outcome = program("infer", *run)
    assert outcome.status == 0, outcome.stderr
    folder = copied / "seg"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["val/masks/miou"] == found["train/masks/miou"] == 1
    assert 0 < found["val/segmented/miou"] < 1
    assert {"val/segmented/iou/background", "train/segmented/recall"} <= set(found)
    for name in ("report.html", "network.safetensors", "DONE.json", "figures/gallery.png"):
        assert (folder / name).stat().st_size > 100
    assert "prototypes" not in (folder / "config.yaml").read_text()
    assert len(list((folder / "masks").iterdir())) == 24
    with Image.open(folder / "masks" / "val_00000.png") as mask:
        assert mask.mode == "P"
        assert tuple(mask.getpalette()[:63]) == palette()[:63]
        (tree,) = copied.glob("data/shapes/seed0-*[0-9a-f]")
        assert mask.size == Image.open(tree / "JPEGImages" / "val_00000.jpg").size
    assert "Already done" in program("infer", *run).stdout
    mask = copied / "pseudo" / "masks" / "train_00003.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    assert_one_line(program("infer", *run), "no segmentation network", "python train.py", "masks=")


def test_a_network_labels_any_picture(made: Path, tmp_path: Path, capsys) -> None:
    (network,) = made.glob("store/segmenter/*/network.safetensors")
    (tree,) = made.glob("data/shapes/seed0-*[0-9a-f]")
    pictures = [str(tree / "JPEGImages" / f"val_0000{i}.jpg") for i in (0, 1)]
    out = tmp_path / "masks"
    command = ["segment", *pictures, "--network", str(network), "--output", str(out)]
    assert main([*command, "--overlays", "--side", "100"]) == 0
    for path in pictures:
        with Image.open(out / f"{Path(path).stem}.png") as mask:
            assert mask.size == Image.open(path).size
            assert int(np.asarray(mask).max()) <= 4
    assert len(list(out.glob("*-overlay.png"))) == 2
    assert main(["segment", *pictures, pictures[0], "--network", str(network)]) == 1
    assert "two pictures of that name" in capsys.readouterr().err
    assert main([*command, "--crf", "nice"]) == 1
    assert "--crf='nice': choose from" in capsys.readouterr().err
    assert main([*command, "--image-prior", "11"]) == 1
    assert "--image-prior=11.0: should be less than" in capsys.readouterr().err
    assert main(["segment", *pictures, "--network", pictures[0]]) == 1
    assert "no readable segmentation network" in capsys.readouterr().err


def test_bad_input_is_one_line(program, copied: Path) -> None:
    (ckpt,) = copied.glob("store/segmenter/*/network.safetensors")
    common = (*TINY, *NETWORK, *LEARN)

    def infer(*overrides: str):
        return program("infer", *common, *overrides, *at(copied, "bad"))

    assert_one_line(infer(), "masks: needs a value")
    assert_one_line(infer(f"masks={copied / 'nowhere'}"), "no such folder")
    assert_one_line(infer(masks(copied), "segmenter.merge=sum"), "segmenter.merge='sum'")
    assert_one_line(infer(masks(copied), "segmenter.crop=0"), "segmenter.crop=0: should be")
    assert_one_line(infer(f"ckpt={ckpt}", "segmenter.export=voc"), "VOC's 20 classes")
    prototypes = copied / "pseudo" / "prototypes.safetensors"
    assert_one_line(infer(f"ckpt={prototypes}"), "holds no segmentation network")
    wrong = program("infer", *TINY, *NETWORK, f"ckpt={ckpt}", *at(copied, "bad"))
    assert_one_line(wrong, "network.safetensors", "no Classifier")
    shutil.copytree(copied / "pseudo", copied / "partial")
    (copied / "partial" / "masks" / "train_00000.png").unlink()
    outcome = infer(f"masks={copied / 'partial'}")
    assert_one_line(outcome, "lacks 1 of 16 files", "dataset.map_splits")


def test_ckpt_labels_without_masks(program, made: Path, tmp_path: Path) -> None:
    (ckpt,) = made.glob("store/segmenter/*/network.safetensors")
    shutil.copytree(made / "data", tmp_path / "data")
    overrides = ("dataset.map_splits=[val]", f"ckpt={ckpt}", "report=false")
    outcome = program("infer", *TINY, *NETWORK, *LEARN, *overrides, *at(tmp_path))
    assert outcome.status == 0, outcome.stderr
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {key.split("/")[1] for key in found} == {"segmented"}


def test_pictures_without_labels_go_to_pascals_server(program, tmp_path: Path) -> None:
    """VOC publishes neither labels nor masks of test."""
    root = tmp_path / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for folder in (lists, root / "Annotations", root / "JPEGImages"):
        folder.mkdir(parents=True)
    xml = "<annotation><object><name>cat</name></object></annotation>"
    for split in ("train", "val", "test"):
        (lists / f"{split}.txt").write_text(f"{split}_1\n")
        Image.new("RGB", (90, 70)).save(root / "JPEGImages" / f"{split}_1.jpg")
        if split != "test":
            (root / "Annotations" / f"{split}_1.xml").write_text(xml)
    network = build_network("test_resnet", None, 20, Architecture("deeplab_v2", 16, (1, 2)))
    path = tmp_path / "network.safetensors"
    architecture = Architecture("deeplab_v2", 16, (1, 2))
    save_network(path, network, CLASSES, "test_resnet", architecture)
    data = (
        "dataset=voc",
        f"dataset.root={root}",
        "dataset.train_split=train",
        "dataset.map_splits=[test]",
        "trainer=cpu",
        "logger=none",
        "num_workers=0",
    )
    settings = (*NETWORK, "task=segmentation", f"ckpt={path}", "segmenter.export=voc")
    outcome = program("infer", *data, *settings, *at(tmp_path))
    assert outcome.status == 0, outcome.stderr
    folder = tmp_path / "run" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    with Image.open(folder / "test_1.png") as mask:
        assert (mask.mode, mask.size) == ("P", (90, 70))
        assert tuple(mask.getpalette()[:63]) == palette()[:63]
    assert (tmp_path / "run" / "metrics.json").read_text().strip() == "{}"


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_same_weights(
    program, made: Path, tmp_path: Path
) -> None:
    """SIGKILL, whenever it comes: the weights are those of an undisturbed training to the bit."""
    longer = (*TINY, *NETWORK, *LEARN, "segmenter.steps=60", "segmenter.save_every=3", masks(made))
    shutil.copytree(made / "data", tmp_path / "data")
    command = [sys.executable, "train.py", *longer, *at(tmp_path, "killed")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("store/segmenter/*.partial/last.ckpt")):
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("store/segmenter/*/network.safetensors"))
    weights = []
    shutil.copytree(made / "data", tmp_path / "whole" / "data")
    for root in (tmp_path, tmp_path / "whole"):
        outcome = program("train", *longer, *at(root))
        assert outcome.status == 0, outcome.stderr
        (path,) = root.glob("store/segmenter/*/network.safetensors")
        weights.append(path.read_bytes())
    assert weights[0] == weights[1]
