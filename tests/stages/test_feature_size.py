"""Local features that would fill the disk are refused before any pass."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from lpcam.models.backbones import build_backbone
from lpcam.settings import make
from lpcam.stages import features as stage
from lpcam.stages import memory, passes
from lpcam.stages.features import FeatureLimit, features
from lpcam.stages.passes import ViewSettings, feature_bytes
from tests.conftest import ROOT

COCO = 82_783


@dataclass
class Host:
    """What the stage reads of a host; ResNet-50's by default."""

    stride: int = 16
    backbone: Any = field(default_factory=lambda: SimpleNamespace(dim=2048))
    feature_key: str = "f"
    score_key: str = "s"
    maps_from_features: bool = True


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each pass was for; a pass writes nothing."""
    counts: list[int] = []

    def predict(make_trainer: Any, host: Any, pictures: list[Picture], *_: Any, **__: Any) -> None:
        counts.append(len(pictures))

    monkeypatch.setattr(stage, "predict", predict)
    return counts


def faked(
    monkeypatch: pytest.MonkeyPatch, folder: Path, count: int, width: int = 640, height: int = 480
) -> list[Picture]:
    """So many pictures of a size that their files do not have."""
    file = folder / "any.jpg"
    file.touch()

    @contextmanager
    def opened(path: Path, *, decode: bool) -> Iterator[Any]:
        assert path == file
        assert not decode
        yield SimpleNamespace(width=width, height=height)

    for module in (passes, memory):
        monkeypatch.setattr(module, "open_image", opened)
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**15))
    return [Picture(str(index), file, (0,)) for index in range(count)]


def build(store: Path, pictures: list[Picture], **options: Any) -> Any:
    host = options.pop("host", Host())
    return features(store, None, host, pictures, num_workers=0, **{"local": True} | options)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.5]])
def test_the_estimate_is_what_features_take(tmp_path: Path, scales: list[float]) -> None:
    torch.manual_seed(0)
    host: Any = Host(backbone=build_backbone("test_resnet", None))
    host.stride = host.backbone.stride
    sizes = [(64, 64), (65, 100), (90, 33)]
    pictures, taken = [], 0
    for width, height in sizes:
        path = tmp_path / f"{width}.png"
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
        pictures.append(Picture(path.stem, path, (0,)))
        for scale in scales:
            sides = (math.ceil(height * scale), math.ceil(width * scale))
            with torch.no_grad():
                taken += host.backbone(torch.zeros(1, 3, *sides)).half().nbytes
    assert feature_bytes(host, pictures, scales) == taken


def test_all_of_coco_is_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int]
) -> None:
    pictures = faked(monkeypatch, tmp_path, COCO)
    lite = Host(backbone=SimpleNamespace(dim=1280))
    with pytest.raises(InputError) as caught:
        build(tmp_path / "store", pictures, host=lite, limit=FeatureLimit())
    assert str(caught.value) == (
        "prototypes.max_features=50: the local features of 82783 pictures would take 254 GB of the "
        "store; set prototypes.images_per_class=100, as the paper does on COCO, or "
        "prototypes.max_features=255"
    )
    assert not passed
    assert not (tmp_path / "store").exists()


# Of the paper's ResNet-50: VOC's train_aug, and 100 pictures of each of COCO's 80 classes.
@pytest.mark.parametrize(("count", "side"), [(10_582, (500, 375)), (8_000, (640, 480))])
def test_the_papers_recipes_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passed: list[int],
    count: int,
    side: tuple[int, int],
) -> None:
    pictures = faked(monkeypatch, tmp_path, count, *side)
    build(tmp_path / "store", pictures, limit=FeatureLimit())
    assert passed == [count]
    assert 25e9 < feature_bytes(Host(), pictures, [1.0]) < 50e9  # type: ignore[arg-type]


def test_the_limit_counts_scale_1_and_is_inclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int]
) -> None:
    pictures = faked(monkeypatch, tmp_path, 2)
    size = 2 * 2 * 40 * 30 * 2048 / 1e9
    views = ViewSettings((0.5, 1.0, 2.0), True)
    for options in ({}, {"sampled": views}):
        with pytest.raises(InputError, match=r"would take 0\.00983 GB .*\.max_features=1$"):
            build(tmp_path, pictures, limit=FeatureLimit(size * 0.999), **options)
        assert not passed
        build(tmp_path, pictures, limit=FeatureLimit(size), **options)
        assert passed == [2]
        passed.clear()


def test_only_local_features_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int]
) -> None:
    pictures = faked(monkeypatch, tmp_path, 2)
    build(tmp_path, pictures, local=False, limit=FeatureLimit(0))
    build(tmp_path, pictures)
    assert passed == [2, 2]


def test_features_that_are_there_have_no_limit_and_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int]
) -> None:
    pictures = faked(monkeypatch, tmp_path, 2)
    made = build(tmp_path, pictures, limit=FeatureLimit())
    assert build(tmp_path, pictures, limit=FeatureLimit(0)).key == made.key
    assert build(tmp_path, pictures).key == made.key
    assert passed == [2]


def test_the_setting_is_that_of_the_config() -> None:
    prototypes = yaml.safe_load((ROOT / "conf/prototypes/default.yaml").read_text())
    assert FeatureLimit(prototypes["max_features"]) == FeatureLimit()


@pytest.mark.parametrize("value", [-1, "50", None, float("nan"), True])
def test_what_is_no_number_of_gb(value: Any) -> None:
    with pytest.raises(InputError, match="max_features="):
        make(FeatureLimit, {"max_features": value})


def test_a_disk_without_room_is_named_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passed: list[int]
) -> None:
    """What an earlier, killed run left needs no more room."""
    pictures = faked(monkeypatch, tmp_path, 1000)
    whole = feature_bytes(Host(), pictures, [1.0])  # type: ignore[arg-type]
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda _: SimpleNamespace(free=whole / 2))
    with pytest.raises(InputError) as caught:
        build(tmp_path / "store", pictures)
    assert f"of 1000 pictures take {whole / 1e9:.3g} GB" in str(caught.value)
    assert f"{whole / 2e9:.3g} GB are free" in str(caught.value)
    assert str(tmp_path / "store") in str(caught.value)
    assert passed == []
    (partial,) = tmp_path.glob("store/features/*.partial")
    for picture in pictures[:500]:
        (partial / f"{picture.id}.npz").touch()
    build(tmp_path / "store", pictures)
    assert passed == [1000]


@pytest.mark.parametrize(("cuda", "what"), [(False, "machine"), (True, "GPU")])
def test_a_picture_too_large_for_the_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, what: str
) -> None:
    """8000x8000 at scale 2, mirrored: 290 bytes of 256 million pixels, twice."""
    pictures = faked(monkeypatch, tmp_path, 2, 8000, 8000)
    monkeypatch.setattr(memory, "memory", lambda *, cuda: 140e9 if cuda else 24e9)
    check = partial(memory.check_memory, pictures, cuda=cuda)
    with pytest.raises(InputError) as caught:
        check([0.5, 2.0], flip=True, batch_size=1)
    line = str(caught.value)
    assert line.startswith(f"{pictures[0].path}: a pass over 8000x8000 pixels at scale 2 takes ")
    assert f"about 148 GB, and the {what} has {140 if cuda else 24}" in line
    check([0.5, 1.0], flip=False, batch_size=1)
    check([0.5], flip=True, batch_size=2)


def test_there_is_some_memory() -> None:
    assert 2**28 < memory.memory(cuda=False) < 2**50
