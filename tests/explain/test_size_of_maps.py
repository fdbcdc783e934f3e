"""Maps that would not fit into memory are refused before anything is allocated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lpcam import LPCAM
from lpcam.__main__ import main
from lpcam.data.transforms import normalize
from lpcam.errors import InputError
from lpcam.explain import explainer
from lpcam.explain.command import choose
from lpcam.explain.views import PAPER_VIEWS, SINGLE_VIEW, Views
from lpcam.models.backbones import build_backbone

CLASSES = 50


@pytest.fixture
def cam() -> LPCAM:
    """Every class is fitted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    found = LPCAM(model, k=1, class_score=0.0, activation=0.0)
    return found.fit([(torch.randn(CLASSES, 3, 4, 4), torch.eye(CLASSES))], progress=False)


def test_the_bound_is_8_gb() -> None:
    assert explainer.MAX_BYTES == 8e9


# Bytes by hand: 4 each, of 2 pictures of 10 x 20 pixels.
@pytest.mark.parametrize(
    ("labels", "views", "maps"),
    [
        (torch.zeros(2, CLASSES), SINGLE_VIEW, 2 * CLASSES),
        (torch.eye(CLASSES)[:2], SINGLE_VIEW, 2 * CLASSES + 2 * 3),
        (torch.eye(CLASSES)[:2], PAPER_VIEWS, 2 * CLASSES + 2 * 9),
        (None, iter(PAPER_VIEWS), 2 * CLASSES + 2 * CLASSES * 9),
    ],
)
def test_what_a_call_needs(
    cam: LPCAM, monkeypatch: pytest.MonkeyPatch, labels: Tensor | None, views: Views, maps: int
) -> None:
    views = list(views)
    images = torch.randn(2, 3, 10, 20)
    needed = 4 * 10 * 20 * maps
    assert cam.head.fitted == list(range(CLASSES))

    monkeypatch.setattr(explainer, "MAX_BYTES", needed)
    assert cam(images, labels, views=iter(views)).shape == (2, CLASSES, 10, 20)
    with pytest.raises(InputError, match="maps of"):
        cam.compare(images, labels, views=views)
    monkeypatch.setattr(explainer, "MAX_BYTES", needed - 1)
    with pytest.raises(InputError, match="maps of"):
        cam(images, labels, views=views)
    monkeypatch.setattr(explainer, "MAX_BYTES", needed + 4 * 10 * 20 * 2 * CLASSES)
    cam.compare(images, labels, views=views)


def test_it_is_refused_in_one_line_before_the_model_runs(cam: LPCAM) -> None:
    # Not one byte of these pictures exists.
    images = torch.zeros(1).expand(64, 3, 2000, 1500)
    runs: list[None] = []
    handle = cam.model.register_forward_hook(lambda *_: runs.append(None))
    with pytest.raises(InputError) as caught:
        cam(images, torch.eye(CLASSES)[torch.arange(64) % CLASSES])
    handle.remove()
    assert str(caught.value) == (
        "images: maps of 64 x 50 x 2000 x 1500 (pictures, classes, height, width) take 40.7 GB of "
        "memory, the bound is 8; give fewer pictures a call, smaller ones (--side), or a model "
        "with fewer classes"
    )
    assert not runs


@pytest.mark.parametrize(("side", "status"), [(64, 0), (96, 1)])
def test_the_command_names_the_side(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    side: int,
    status: int,
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet", None)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "a.png")
    torch.save(backbone.network.state_dict(), tmp_path / "a.pth")
    images = normalize(picture, backbone.mean, backbone.std)[None]
    labels = torch.eye(backbone.network.num_classes)[:1]
    cam = LPCAM(backbone.network, k=1, class_score=0.0, activation=0.0)
    cam.fit([(images, labels)], progress=False).save(tmp_path / "a.safetensors")
    monkeypatch.setattr(explainer, "MAX_BYTES", 4 * 64 * 64 * (labels.shape[1] + 3))

    found = main(
        ["explain", str(tmp_path / "a.png"), "--model=test_resnet", f"--side={side}",
         f"--weights={tmp_path / 'a.pth'}", f"--prototypes={tmp_path / 'a.safetensors'}",
         f"--output={tmp_path}"]
    )  # fmt: skip

    error = capsys.readouterr().err
    assert found == status
    assert ("smaller ones (--side)" in error) == bool(status)
    assert error.count("\n") == status


def test_the_command_without_any_prototype_is_one_line(cam: LPCAM) -> None:
    cam.prototypes = replace(
        cam.prototypes, foreground=tuple(v[:0] for v in cam.prototypes.foreground)
    )
    with pytest.raises(InputError, match="none of any class"):
        choose(cam, torch.randn(1, 3, 4, 4), [], 1)
