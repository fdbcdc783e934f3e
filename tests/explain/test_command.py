import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from lpcam import LPCAM
from lpcam.__main__ import main
from lpcam.data.transforms import normalize
from lpcam.hosts.amn import AMN
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.prototypes.prototype_set import Prototypes

TABBY, ESPRESSO = 281, 967  # of ImageNet's classes


def half(photo: np.ndarray) -> Image.Image:
    return Image.fromarray(photo).resize((photo.shape[1] // 2, photo.shape[0] // 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos, and prototypes of their classes under ImageNet's weights."""
    folder = tmp_path_factory.mktemp("explain")
    backbone = build_backbone("efficientnet_lite0")
    names = [f"class {c}" for c in range(1000)]
    names[TABBY], names[ESPRESSO] = "tabby cat", "espresso"
    cam = LPCAM(backbone.network, k=3, class_score=0.0, classes=names)
    batches = []
    for name, photo, label in (
        ("cat", data.chelsea(), TABBY),
        ("cup", data.coffee(), ESPRESSO),
    ):
        picture = half(photo)
        picture.save(folder / f"{name}.png")
        labels = torch.zeros(1, 1000)
        labels[0, label] = 1
        batches.append((normalize(picture, backbone.mean, backbone.std)[None], labels))
    cam.fit(batches, progress=False).save(folder / "prototypes.safetensors")
    return folder


def explain(folder: Path, *options: str, pictures: tuple[str, ...] = ("cat.png", "cup.png")) -> int:
    return main(
        [
            "explain",
            *(str(folder / name) for name in pictures),
            "--model=tf_efficientnet_lite0",
            f"--prototypes={folder / 'prototypes.safetensors'}",
            *options,
        ]
    )


def test_an_amn_says_that_it_needs_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = AMN(build_backbone("efficientnet_lite0", None), 1000, dilations=[1])
    torch.save(host.state_dict(), tmp_path / "amn.ckpt")
    assert explain(folder, f"--ckpt={tmp_path / 'amn.ckpt'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "amn.ckpt: an AMN, which needs image labels" in line


def test_pictures_in_overlays_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(folder, f"--output={tmp_path / 'new' / 'out'}") == 0

    written = sorted((tmp_path / "new" / "out").iterdir())
    assert [path.name for path in written] == ["cat-tabby_cat.png", "cup-espresso.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    heat = {}
    for path, name in zip(written, ("cat", "cup"), strict=True):
        with Image.open(path) as shown, Image.open(folder / f"{name}.png") as picture:
            assert shown.size == picture.size
            heat[name] = np.asarray(shown, float).mean(2) - np.asarray(picture.convert("L"), float)
    # The cat's face lies in the middle; the lower left corner is a blanket.
    assert heat["cat"][40:110, 60:160].mean() > heat["cat"][-30:, :30].mean()


def test_classes_can_be_named(folder: Path, tmp_path: Path) -> None:
    options = ("--classes", "espresso", "tabby cat", "--multi-scale", "--aggregate=max")
    assert explain(folder, f"--output={tmp_path}", *options, pictures=("cat.png",)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cat-tabby_cat.png", "cat-espresso.png"}


def test_prototypes_of_a_run_with_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = Classifier(build_backbone("efficientnet_lite0"), 2)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "last.ckpt")
    prototypes = Prototypes(
        ("a", "b"),
        (torch.rand(1, 1280), torch.rand(2, 1280)),
        (torch.rand(1, 1280), torch.rand(0, 1280)),
        (([0], [3]), ([1, 2], [])),
    )
    prototypes.save(tmp_path / "prototypes.safetensors")
    shutil.copy(folder / "cat.png", tmp_path)

    status = explain(
        tmp_path,
        f"--ckpt={tmp_path / 'last.ckpt'}",
        f"--output={tmp_path / 'out'}",
        "--top=2",
        pictures=("cat.png",),
    )

    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cat-a.png", "cat-b.png"}


def test_weights_from_a_file(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_backbone("resnet18", None).network
    network.reset_classifier(2)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    image = normalize(Image.open(folder / "cat.png"), (0.5,) * 3, (0.25,) * 3)[None]
    cam = LPCAM(network, k=1, class_score=0.0, classes=["a", "b"])
    cam.fit([(image, torch.ones(1, 2))], progress=False).save(tmp_path / "own.safetensors")

    status = main(
        ["explain", str(folder / "cat.png"), "--model=resnet18", f"--output={tmp_path / 'out'}",
         f"--weights={tmp_path / 'own.pth'}", f"--prototypes={tmp_path / 'own.safetensors'}"]
    )  # fmt: skip

    assert status == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "pictures", "reason"),
    [
        ((), ("none.png",), "none.png: not a readable image"),
        ((), ("prototypes.safetensors",), "prototypes.safetensors: not a readable image"),
        (("--model=resnet1",), ("cat.png",), "--model=resnet1: unknown"),
        (("--prototypes=no",), ("cat.png",), "no: no readable file of prototypes"),
        (("--classes", "dog"), ("cat.png",), "class 'dog': 0 classes are called that"),
        (("--aggregate=median",), ("cat.png",), "aggregate=median: unknown"),
        ((), ("cat.png", "cat.png"), "two pictures or classes of that name"),
        (("--ckpt=none.ckpt",), ("cat.png",), "none.ckpt: no such file of weights"),
    ],
)
def test_mistakes_are_one_line_and_status_1(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    pictures: tuple[str, ...],
    reason: str,
) -> None:
    assert explain(folder, f"--output={tmp_path}", *options, pictures=pictures) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1


def test_another_models_prototypes_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = Prototypes(("a",), (torch.rand(1, 4),), (torch.rand(0, 4),), (([0], []),))
    two.save(tmp_path / "two.safetensors")
    options = (f"--output={tmp_path}", f"--prototypes={tmp_path / 'two.safetensors'}")
    assert explain(folder, *options) == 1
    assert "1 classes, and efficientnet_lite0 has 1000; give --ckpt" in capsys.readouterr().err


def test_an_output_that_is_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()
    assert explain(folder, f"--output={tmp_path / 'out'}") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_program_runs_and_a_mistyped_option_ends_with_2() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lpcam", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    helped, mistyped = run("explain", "--help"), run("explain", "a.png", "--modle=resnet18")
    assert (helped.returncode, mistyped.returncode) == (0, 2)
    assert "--prototypes" in helped.stdout
    assert "Traceback" not in mistyped.stderr


@pytest.mark.parametrize("option", ["--top=0", "--side=0", "--side=-5", "--top=two"])
def test_a_number_that_cannot_be_ends_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        explain(folder, option)
    assert ended.value.code == 2
    name, _, value = option.partition("=")
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: " in line
    assert value in line
