"""Training and inference by two real processes (gloo, CPU), from an empty store."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lpcam.data.loaders import pooled_loader
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import load_host
from lpcam.segmentation.networks import Architecture, build_network
from tests.conftest import ROOT, TINY, TINY_INFER, TINY_TRAIN, unpacked

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def command(name: str, root: Path, *overrides: str) -> dict[str, float]:
    """Run a program as a user would, and give back its metrics."""
    output = root / f"{name}-{len(list(root.iterdir()))}"
    folders = (f"paths.root={root}", f"hydra.run.dir={output}")
    words = [sys.executable, f"{name}.py", *TINY, *overrides, "report=false", *folders]
    if name == "train":
        words.remove("report=false")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    root = tmp_path_factory.mktemp("two")
    return root, command("train", root, *TINY_TRAIN, *TWO)


@pytest.mark.slow
def test_training_reports_the_metrics_of_all_pictures(
    trained: tuple[Path, dict[str, float]],
) -> None:
    """One process that scores the same weights on the whole of val finds the same."""
    root, metrics = trained
    (checkpoint,) = root.glob("store/classifier/*/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 100
    assert json.loads((checkpoint.parent / "metrics.json").read_text()) == metrics

    manifests = [json.loads(p.read_text()) for p in root.glob("store/features/*/manifest.json")]
    assert len(manifests) == 2
    backbone = build_backbone(OmegaConf.load(ROOT / "conf/backbone/efficientnet_lite0.yaml").name)
    classifier = load_host(checkpoint, Classifier(backbone, 4))
    stages = map(unpacked, root.glob("store/features/*/"))
    (val,) = (found for found in stages if "val_00000.npz" in found)
    files = sorted(val)
    assert len(files) == 8
    pooled = np.stack([np.load(io.BytesIO(val[name]))["pooled"] for name in files])
    (tree,) = root.glob("data/shapes/seed0-*[0-9a-f]")
    labels = np.zeros((8, 4), np.float32)
    names = ("ringhead", "stripehead", "spothead", "checkhead")
    for row, name in enumerate(files):
        text = (tree / "Annotations" / name.replace(".npz", ".xml")).read_text()
        labels[row] = [f"<name>{name}</name>" in text for name in names]
    with torch.no_grad():
        for batch in pooled_loader(pooled, labels, batch_size=8, shuffle=False):
            loss = torch.nn.functional.multilabel_soft_margin_loss(classifier(batch[0]), batch[1])
    assert metrics["val/loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.slow
def test_inference_gives_what_one_process_gives(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    root, _ = trained
    (checkpoint,) = root.glob("store/classifier/*/last.ckpt")
    options = (*TINY_INFER, f"ckpt={checkpoint}", "prototypes.split=multi_scale", "refiner=par")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two = command("infer", tmp_path / "two", *options, *TWO)
    one = command("infer", tmp_path / "one", *options)
    assert one == two
    pictures = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("infer-*/maps/*")}
        for name in ("one", "two")
    }
    assert len(pictures["one"]) == 24
    assert pictures["one"] == pictures["two"]


@pytest.mark.slow
def test_a_segmentation_network_learns_and_labels_as_in_one_process(tmp_path: Path) -> None:
    """Crops without padding, so that each process's mean loss counts as many pixels."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    task = ("task=segmentation", "masks=truth", "backbone=timm", "backbone.name=test_resnet")
    learn = (
        "backbone.weights=null",
        "segmenter.crop_scales=[1.0]",
        "segmenter.crop=96",
        "segmenter.rates=[1,2]",
        "segmenter.steps=4",
        "segmenter.batch_size=4",
        "dataset.sizes=[112]",
    )
    for name, processes in (("one", ()), ("two", TWO)):
        command("train", tmp_path / name, *task, *learn, *processes)
    one, two = (
        load_file(next((tmp_path / name).glob("store/segmenter/*/network.safetensors")))
        for name in ("one", "two")
    )
    pl.seed_everything(0, verbose=False)
    architecture = Architecture("deeplab_v2", output_stride=16, rates=(1, 2))
    before = build_network("test_resnet", None, 4, architecture).state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    learnt = [key for key, value in one.items() if not torch.equal(value, before[key])]
    assert 10 < len(learnt) < len(one)  # not the frozen BatchNorm
    (network,) = tmp_path.glob("one/store/segmenter/*/network.safetensors")
    for name, processes in (("one", ()), ("two", TWO)):
        command("infer", tmp_path / name, *task, *learn, *processes, f"ckpt={network}")
    labels = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("infer-*/masks/*")}
        for name in ("one", "two")
    }
    assert len(labels["one"]) == 24
    assert labels["one"] == labels["two"]


@pytest.mark.slow
def test_a_whole_network_learns_in_two_processes(tmp_path: Path) -> None:
    """Of which timm's own classifier has no part in the loss."""
    network = ("backbone=timm", "backbone.name=test_resnet", "backbone.weights=null")
    crops = ("classifier.epochs=2", "classifier.crop=64", "classifier.long_side=[64,96]")
    found = command("train", tmp_path, "classifier=finetune", *network, *crops, *TWO)
    assert found.keys() >= {"train/loss", "val/map"}


@pytest.mark.slow
def test_processes_of_torchrun_wait_for_each_other(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """Maps are there, or come from kept features: nothing that Lightning would join them by."""
    root, _ = trained
    (checkpoint,) = root.glob("store/classifier/*/last.ckpt")
    given = (*TINY, *TINY_INFER, f"ckpt={checkpoint}", "report=false", "refiner=par")
    folders = (f"paths.root={root}", "logger=none")
    runs = {}
    for name, processes in (("one", ()), ("two", (*TWO, "prototypes.k=3")), ("again", TWO)):
        words = [sys.executable, "infer.py"]
        if processes:
            words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", words[1]]
        words += [*given, *folders, *processes, f"hydra.run.dir={tmp_path / name}"]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250
        )
        assert done.returncode == 0, done.stderr
        runs[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert runs["again"] == runs["one"]
    assert runs["two"]["val/cam/miou"] == runs["one"]["val/cam/miou"]
