import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.errors import InputError
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, lpcam_setting
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.stages import callbacks
from lpcam.stages.callbacks import FeatureCallback, LPCAMCallback
from lpcam.storage.records import Records
from lpcam.storage.store import Stage
from tests.conftest import unpacked
from tests.oracles import activation, multiscale
from tests.prototypes.map_cases import CLASSES, Case


@dataclass(frozen=True)
class Scene:
    """Pictures on disk and a classifier of them."""

    pictures: list[Picture]
    classifier: Classifier
    folder: Path

    def predict(
        self,
        *callbacks: pl.Callback,
        batch_size: int = 3,
        scales: Sequence[float] = (0.5, 1.0),
        flip: bool = True,
    ) -> None:
        loader = view_loader(
            self.pictures,
            CLASSES,
            scales=scales,
            flip=flip,
            batch_size=batch_size,
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.predict(self.classifier, loader, return_predictions=False)

    def features(self, picture: Picture) -> list[Tensor]:
        """What the backbone says of one picture, view by view; its pictures are 0.5 +- 0.5."""
        image = Image.open(picture.path)
        scales = []
        for side in (0.5, 1.0):
            width, height = (round(length * side) for length in image.size)
            small = image.resize((width, height), Image.Resampling.BICUBIC)
            pixels = (np.asarray(small).transpose(2, 0, 1) / 255 - 0.5) / 0.5
            normalized = torch.tensor(pixels[None], dtype=torch.float32)
            with torch.no_grad():
                views = [self.classifier.backbone(normalized)]
                views.append(self.classifier.backbone(normalized.flip(-1)).flip(-1))
            scales.append(torch.stack(views))
        return scales

    def make(self, name: str) -> Records:
        (self.folder / name).mkdir()
        return Records(self.folder / name)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    rng = np.random.default_rng(16)
    pictures = []
    # Two sizes, in an order that batches of one size do not keep; the third shows no class.
    for name, (height, width), labels in (
        ("first", (64, 80), (0, 2)),
        ("second", (80, 64), (3,)),
        ("third", (64, 80), ()),
        ("fourth", (64, 80), (1, 2, 3)),
    ):
        blocks = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        path = tmp_path / f"{name}.png"
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(path)
        pictures.append(Picture(name, path, labels))
    torch.manual_seed(17)
    classifier = Classifier(build_backbone("test_resnet", None), CLASSES).eval()
    return Scene(pictures, classifier, tmp_path)


def load(records: Records, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(unpacked(records.folder)[name]), allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def prototypes(scene: Scene) -> Prototypes:
    dim = scene.classifier.backbone.dim
    foreground = tuple(torch.randn(3, dim).abs() for _ in range(CLASSES))
    context = tuple(torch.randn(2, dim).abs() for _ in range(CLASSES))
    indices = tuple(([0, 1, 2], [0, 1]) for _ in range(CLASSES))
    return Prototypes(("a", "b", "c", "d"), foreground, context, indices)


def test_each_setting_writes_its_own_maps_into_its_own_folder(
    scene: Scene, prototypes: Prototypes
) -> None:
    kinds = ["both", "cam", "context"]
    maker = MapMaker(
        [lpcam_setting(prototypes, "both"), MapSetting(), lpcam_setting(prototypes, "context")]
    )
    folders = [scene.make(kind) for kind in kinds]

    scene.predict(LPCAMCallback(maker, folders))

    names = [f"{picture.id}.npz" for picture in scene.pictures]
    for picture in scene.pictures:
        size = Image.open(picture.path).size[::-1]
        grid = (size[0] // 4, size[1] // 4)
        case = Case(scene.features(picture), scene.classifier.weight, prototypes)
        for kind, folder in zip(kinds, folders, strict=True):
            assert sorted(unpacked(folder.folder)) == sorted(names)
            found = load(folder, f"{picture.id}.npz")
            assert {key: value.dtype for key, value in found.items()} == {
                "keys": np.int64,
                "maps": np.float16,
                "size": np.int64,
            }
            assert found["keys"].tolist() == list(picture.labels or ())
            assert found["maps"].shape == (len(found["keys"]), *grid)
            assert tuple(found["size"]) == size
            for key, values in zip(found["keys"], found["maps"], strict=True):
                expected = case.expected(kind, 0, key, size)
                np.testing.assert_allclose(values, expected, rtol=0, atol=2e-3)


class LeftHalf(Classifier):
    """A host that lets LPCAM be active in the left half of a picture only."""

    finishes = True

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        assert views.features.shape[-2:] == maps.shape[-2:]
        left = torch.arange(maps.shape[-1], device=maps.device) < maps.shape[-1] // 2
        return maps * left


def test_the_host_finishes_lpcam_and_not_its_own_maps(scene: Scene, prototypes: Prototypes) -> None:
    def write(scene: Scene, name: str) -> list[Records]:
        folders = [scene.make(f"{name}_lpcam"), scene.make(f"{name}_cam")]
        maker = MapMaker([lpcam_setting(prototypes, "class"), MapSetting()])
        scene.predict(LPCAMCallback(maker, folders), scales=[1.0])
        return folders

    host = LeftHalf(build_backbone("test_resnet", None), CLASSES).eval()
    host.load_state_dict(scene.classifier.state_dict())
    plain = write(scene, "plain")
    finished = write(Scene(scene.pictures, host, scene.folder), "finished")

    for picture in scene.pictures:
        name = f"{picture.id}.npz"
        assert finished[1].read(name) == plain[1].read(name)
        before, after = (load(folders[0], name)["maps"] for folders in (plain, finished))
        width = before.shape[-1]
        assert not after[..., 3 * width // 4 :].any()
        if picture.labels:
            assert before[..., 3 * width // 4 :].any()
            assert after[..., : width // 4].any()


@pytest.mark.parametrize("size", [1, 3])
def test_kept_features_are_those_that_lpcam_reads(
    scene: Scene, prototypes: Prototypes, size: int
) -> None:
    settings = [lpcam_setting(prototypes, "both"), lpcam_setting(prototypes, "context")]
    maker = MapMaker(settings, rounded=True)
    folders, kept = [scene.make("both"), scene.make("context")], scene.make("kept")

    scene.predict(LPCAMCallback(maker, folders, kept=kept), batch_size=size)

    names = sorted(f"{picture.id}.npz" for picture in scene.pictures)
    assert sorted(unpacked(kept.folder)) == names
    for picture in scene.pictures:
        found = list(load(kept, f"{picture.id}.npz").values())
        assert [scale.dtype for scale in found] == [np.float16] * 2
        for scale, views in zip(found, scene.features(picture), strict=True):
            np.testing.assert_allclose(scale, views.mean(0)[0], rtol=2e-3, atol=1e-3)
        scales = [HostViews(torch.from_numpy(scale)[None, None].float()) for scale in found]
        labels = torch.zeros(1, CLASSES).bool()
        labels[0, list(picture.labels or ())] = True
        made = maker(scales, labels, Image.open(picture.path).size[::-1])
        for folder, maps in zip(folders, made, strict=True):
            # As precise as a record: it holds multiples of 2^-9.
            written = load(folder, f"{picture.id}.npz")["maps"]
            np.testing.assert_allclose(written, maps, rtol=0, atol=2**-10 + 2**-11)


def test_a_picture_without_labels_alone_in_its_batch(scene: Scene) -> None:
    folder = scene.make("cam")
    scene.predict(LPCAMCallback(MapMaker([MapSetting()]), [folder]), batch_size=1)
    found = load(folder, "third.npz")
    assert found["keys"].shape == (0,)
    assert found["maps"].shape == (0, 16, 20)
    assert found["size"].tolist() == [64, 80]


@pytest.mark.parametrize("size", [1, 2])
def test_feature_files_with_maps_over_all_views(scene: Scene, size: int) -> None:
    folder = scene.make("features")
    weight = scene.classifier.weight
    scene.predict(
        FeatureCallback(folder, local=True, maps="multi_scale"), batch_size=size, scales=[1.0, 0.5]
    )
    for picture in scene.pictures:
        found = load(folder, f"{picture.id}.npz")
        half, whole = (views[:, 0].double().numpy() for views in scene.features(picture))
        assert found["maps"].dtype == np.float32
        assert found["maps"].shape == (len(picture.labels or ()), *found["local"].shape[:2])
        np.testing.assert_allclose(
            found["local"].transpose(2, 0, 1), whole[0], rtol=2e-3, atol=1e-3
        )
        for label, values in zip(picture.labels or (), found["maps"], strict=True):
            expected = multiscale.sampled_plain_map(
                [whole, half], weight[label].double().numpy(), Image.open(picture.path).size[::-1]
            )
            np.testing.assert_allclose(values, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("views", [{"scales": [1.0], "flip": False}, {"scales": [1.0, 0.5]}])
@pytest.mark.parametrize("local", [True, False])
def test_feature_files_with_maps_of_the_features_themselves(
    scene: Scene, local: bool, views: dict[str, Any]
) -> None:
    folder = scene.make("features")
    weight = scene.classifier.weight.double().numpy()
    scene.predict(FeatureCallback(folder, local=local, maps="single_view"), batch_size=2, **views)
    active = 0
    for picture in scene.pictures:
        found = load(folder, f"{picture.id}.npz")
        assert found.keys() == ({"pooled", "local", "maps"} if local else {"pooled", "maps"})
        plain = scene.features(picture)[1][:1, 0].double().numpy()
        assert found["maps"].dtype == np.float32
        assert found["maps"].shape == (len(picture.labels or ()), *plain.shape[2:])
        for label, values in zip(picture.labels or (), found["maps"], strict=True):
            rectified = activation.class_activation_map(plain, weight[[label]])[0, 0]
            expected = activation.normalize_map(rectified, 1e-5)
            np.testing.assert_allclose(values, expected, rtol=0, atol=5e-5)
            active += expected.max() > 0.9
    assert active >= 3  # of six; a random classifier's score may be below 0 everywhere


@pytest.mark.parametrize("local", [True, False])
def test_feature_files(scene: Scene, local: bool) -> None:
    folder = scene.make("features")
    scene.predict(FeatureCallback(folder, local=local), batch_size=2, scales=[1.0], flip=False)

    names = sorted(f"{picture.id}.npz" for picture in scene.pictures)
    assert sorted(unpacked(folder.folder)) == names
    for picture in scene.pictures:
        plain = scene.features(picture)[1][0, 0].numpy()
        found = load(folder, f"{picture.id}.npz")
        assert found.keys() == ({"pooled", "local"} if local else {"pooled"})
        assert found["pooled"].dtype == np.float32
        mean = plain.reshape(len(plain), -1).astype(np.float64).mean(1)
        np.testing.assert_allclose(found["pooled"], mean, rtol=1e-3, atol=1e-4)
        if local:
            assert found["local"].dtype == np.float16
            assert found["local"].shape == (*plain.shape[1:], len(plain))
            for row, column in np.ndindex(plain.shape[1:]):
                np.testing.assert_allclose(
                    found["local"][row, column], plain[:, row, column], rtol=2e-3, atol=1e-3
                )


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])  # the last is none in half precision
@pytest.mark.parametrize("kind", ["features", "maps"])
def test_no_number_that_is_none_leaves_a_pass(scene: Scene, value: float, kind: str) -> None:
    real = scene.classifier.backbone.forward

    def spoiled(x: Tensor) -> Tensor:
        features = real(x).clone()
        features[:, 1] = value
        return features

    scene.classifier.backbone.forward = spoiled  # type: ignore[method-assign]
    folder = scene.make("results")
    callback: Any = FeatureCallback(folder, local=True)
    if kind == "maps":
        callback = LPCAMCallback(MapMaker([MapSetting()]), [scene.make("maps")], kept=folder)
    with pytest.raises(InputError, match=r"^(first|second|third|fourth): .*no finite numbers"):
        scene.predict(callback, scales=[1.0], flip=False)
    assert not list(folder.folder.iterdir())


def test_the_finer_stage_comes_to_the_device_of_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that holds no numbers, for want of another beside the CPU."""
    monkeypatch.setattr(callbacks, "read_finer", lambda stage, image_id: torch.zeros(4, 8, 8))
    devices = []

    def maker(prediction, labels, size, finish, stages):
        devices.extend(stage.device.type for stage in stages)
        return []

    host = Classifier(build_backbone("test_resnet", None), CLASSES).to("meta")
    writer = LPCAMCallback(maker, [], finer=Stage(tmp_path, "finer", {}))
    batch = {"ids": ["a", "b"], "labels": torch.ones(2, CLASSES), "size": (32, 32)}
    writer.write_on_batch_end(None, host, [], None, batch, 0, 0)
    writer.on_predict_epoch_end(None, host)
    assert devices == ["meta", "meta"]
