"""Loading a host, and the stages for hosts whose maps are no function of their features."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.data.loaders import ViewBatch, normalized, view_loader
from lpcam.errors import InputError
from lpcam.models.backbones import Backbone, build_backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import Host, load_host
from lpcam.models.training import fit
from lpcam.prototypes.centers import Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.maps import HostViews, MapSetting, lpcam_setting
from lpcam.prototypes.selection import Selection, select
from lpcam.seeds.record import grid_size, read_seed
from lpcam.stages.centers import centers, prototype_pictures
from lpcam.stages.features import features, read_features
from lpcam.stages.maps import Inference, maps
from lpcam.stages.passes import ViewSettings
from lpcam.storage.hashing import tensors_digest
from lpcam.storage.store import Stage
from tests.conftest import unpacked
from tests.malice import Malicious
from tests.refiners.learning import trainer_maker

CLASSES = 3
CHANNELS = 96


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(3)
    return build_backbone("test_resnet", None)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_trained_classifier_loads_onto_a_fresh_backbone(
    tmp_path: Path, backbone: Backbone, suffix: str
) -> None:
    trained = Classifier(backbone, CLASSES, optimizer="adamw", lr=0.01)
    batches = TensorDataset(torch.randn(6, 3, 32, 32), torch.rand(6, CLASSES).round())
    loader = DataLoader(batches, batch_size=2)
    fit(trainer_maker(), trained, tmp_path, lambda _: (loader, None), epochs=2)
    path = tmp_path / f"last.{suffix}"
    if suffix == "safetensors":
        save_file(trained.state_dict(), path)
    torch.manual_seed(9)
    fresh = build_backbone("test_resnet", None)
    assert fresh.fingerprint != trained.backbone.fingerprint

    loaded = load_host(path, Classifier(fresh, CLASSES))

    assert isinstance(loaded, Classifier)
    assert not loaded.training
    assert loaded.backbone.fingerprint == trained.backbone.fingerprint
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), trained.eval()(images), rtol=0, atol=0)


def refused(path: Path, host: Host) -> str:
    """The one-line message with which a checkpoint is refused; it names the file."""
    with pytest.raises(InputError) as caught:
        load_host(path, host)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, backbone: Backbone) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Classifier(backbone, CLASSES).state_dict()}, path)
    assert "of 3 classes, the data set has 4" in refused(path, Classifier(backbone, 4))
    other = build_backbone("test_vit", None)
    assert "no Classifier on test_vit;" in refused(path, Classifier(other, CLASSES))
    same_width = build_backbone("test_vit3", None)
    assert same_width.dim == CHANNELS
    assert "no Classifier on test_vit3;" in refused(path, Classifier(same_width, CLASSES))
    torch.save(backbone.network.state_dict(), path)
    assert "no Classifier on test_resnet;" in refused(path, Classifier(backbone, CLASSES))
    refused(tmp_path / "missing.ckpt", Classifier(backbone, CLASSES))
    path.write_text("no checkpoint")
    refused(path, Classifier(backbone, CLASSES))


def test_a_pickled_checkpoint_is_refused_and_never_built(
    tmp_path: Path, backbone: Backbone
) -> None:
    path, marker = tmp_path / "last.ckpt", tmp_path / "marker"
    host = Classifier(backbone, CLASSES)
    torch.save({"state_dict": host.state_dict(), "hyper_parameters": Malicious(marker)}, path)
    refused(path, host)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("flip", [True, False])
def test_predicted_views(backbone: Backbone, flip: bool) -> None:
    classifier = Classifier(backbone, CLASSES).eval()
    images = [torch.randn(2, 3, 48, 80), torch.randn(2, 3, 96, 160)]
    batch: ViewBatch = {
        "ids": ["a", "b"],
        "labels": torch.zeros(2, CLASSES),
        "size": (96, 160),
        "views": images,
        "flip": flip,
    }
    weight = classifier.weight.double().numpy()
    with torch.no_grad():
        scales = classifier.predict_step(batch, 0)
        assert [tuple(views.features.shape) for views in scales] == [
            (1 + flip, 2, CHANNELS, 3, 5),
            (1 + flip, 2, CHANNELS, 6, 10),
        ]
        for view, (found, own_maps, extra) in zip(images, scales, strict=True):
            assert extra is None
            expected = np.einsum("cd,vbdyx->vbcyx", weight, found.double().numpy()).clip(0)
            assert own_maps is not None
            np.testing.assert_allclose(own_maps.numpy(), expected, rtol=1e-4, atol=1e-5)
            for b in range(2):
                plain = backbone(view[b : b + 1])[0]
                torch.testing.assert_close(found[0, b], plain, rtol=1e-4, atol=1e-5)
                if flip:
                    mirrored = np.ascontiguousarray(view[b : b + 1].numpy()[..., ::-1])
                    back = backbone(torch.from_numpy(mirrored))[0].numpy()[..., ::-1]
                    np.testing.assert_allclose(found[1, b].numpy(), back, rtol=1e-4, atol=1e-5)
                    assert not torch.allclose(found[1, b], plain, atol=1e-3)


class SquareHost(Host):
    """Maps are weighted squares of features times the picture's brightness, and so are LPCAM's."""

    maps_from_features = False
    finishes = True

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.save_hyperparameters(ignore=["backbone"])
        self.weight = nn.Parameter(torch.rand(num_classes, backbone.dim))

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        weight = self.weight.detach() if classes is None else self.weight.detach()[classes]
        return torch.einsum("pd,ndyx->npyx", weight, features**2)

    def score(self, vectors: Tensor) -> Tensor:
        return vectors**2 @ self.weight.detach().T

    @property
    def score_key(self) -> str:
        return tensors_digest({"weight": self.weight})

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        scales = []
        for view, (found, plain, _) in zip(
            batch["views"], super().predict_step(batch, batch_idx), strict=True
        ):
            assert plain is not None
            bright = F.adaptive_avg_pool2d(view.mean(1, keepdim=True), found.shape[-2:])
            bright = (bright - bright.amin() + 0.1)[None]
            scales.append(HostViews(found, plain * bright, bright))
        return scales

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        assert views.extra is not None
        assert maps.shape[2] == len(classes)
        return maps * views.extra.sum(0)


class Few(SegmentationDataset):
    """Pictures of blocks of random colours; one shows no class."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, ("cat", "dog", "fox"), map_splits=("train",))
        rng = np.random.default_rng(16)
        self.found = []
        for name, (height, width), labels in (
            ("first", (64, 80), (0, 2)),
            ("second", (80, 64), (1,)),
            ("third", (64, 80), ()),
            ("fourth", (64, 80), (1, 2)),
        ):
            blocks = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(root / f"{name}.png")
            self.found.append(Picture(name, root / f"{name}.png", labels))

    def pictures(self, split: str) -> list[Picture]:
        return self.found


class Scene:
    """A host and pictures, and what the stages make of them."""

    def __init__(self, root: Path, host: Host) -> None:
        (root / "pictures").mkdir()
        self.dataset = Few(root / "pictures")
        self.host = host.eval()
        self.store = root / "store"
        self.inference = Inference((0.5, 1.0), True)

    def features(self, sampled: ViewSettings | None = None) -> Stage:
        return features(
            self.store,
            trainer_maker(),
            self.host,
            self.dataset.found,
            local=True,
            num_workers=0,
            sampled=sampled,
        )

    def maps(self, settings: Mapping[str, MapSetting]) -> dict[str, Stage]:
        return maps(
            self.store,
            trainer_maker(),
            self.host,
            self.dataset.found,
            settings,
            self.inference,
            num_workers=0,
        )

    @torch.no_grad()
    def views(self, picture: Picture, scales: Sequence[float], flip: bool) -> list[HostViews]:
        """What the host says of one picture."""
        norm = self.host.backbone
        (batch,) = view_loader([picture], CLASSES, scales=scales, flip=flip)
        return self.host.predict_step(normalized(batch, norm.mean, norm.std), 0)

    def results(self, stage: str) -> list[dict[str, Any]]:
        found = self.store.glob(f"{stage}/*/manifest.json")
        return [json.loads(path.read_text())["inputs"] for path in found]


@pytest.fixture
def scene(tmp_path: Path, backbone: Backbone) -> Scene:
    return Scene(tmp_path, SquareHost(backbone, CLASSES))


@pytest.fixture
def linear(tmp_path: Path, backbone: Backbone) -> Scene:
    classifier = Classifier(backbone, CLASSES)
    classifier.head.weight.data.abs_()  # so that no map is zero everywhere
    return Scene(tmp_path, classifier)


def test_maps_that_features_do_not_tell_are_kept_with_them(scene: Scene) -> None:
    stage = scene.features()
    assert stage.inputs["score"] == scene.host.score_key
    for picture in scene.dataset.found:
        (views,) = scene.views(picture, [1.0], False)
        assert views.maps is not None
        kept = read_features(stage, picture, "maps")
        assert kept.dtype == np.float32
        assert kept.shape == (len(picture.labels or ()), *views.features.shape[-2:])
        for label, found in zip(picture.labels or (), kept, strict=True):
            expected = views.maps[0, 0, label] / (views.maps[0, 0, label].max() + 1e-5)
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    scene.host.weight.data += 0.1
    assert scene.features().key != stage.key


def test_maps_that_features_tell_are_not(linear: Scene) -> None:
    stage = linear.features()
    with np.load(io.BytesIO(unpacked(stage.folder)["first.npz"]), allow_pickle=False) as file:
        assert set(file) == {"pooled", "local"}
    linear.host.head.weight.data += 0.1
    assert linear.features().key == stage.key


@pytest.mark.parametrize("split", ["single_view", "multi_scale"])
def test_features_are_split_by_the_kept_maps(scene: Scene, split: str) -> None:
    sampled = scene.inference.views if split == "multi_scale" else None
    stage = scene.features(sampled)
    pictures, chosen = prototype_pictures(scene.dataset, Draw())
    assert pictures == scene.dataset.found
    clustering = Clustering(k=2, activation=0.4, split=split)
    made, found = centers(scene.store, stage, scene.host, scene.dataset, clustering, chosen)
    assert made.inputs["score"] == scene.host.score_key

    other = 0
    for c in range(CLASSES):
        foreground, context = [], []
        for index in chosen[c]:
            picture = scene.dataset.found[index]
            local = read_features(stage, picture, "local").astype(np.float64)
            kept = read_features(stage, picture, "maps")[(picture.labels or ()).index(c)]
            foreground.append(local[kept >= 0.4])
            context.append(local[kept < 0.4])
            from_features = (local**2 @ scene.host.weight[c].detach().double().numpy()).astype(
                float
            )
            other += int(((from_features / from_features.max() >= 0.4) != (kept >= 0.4)).sum())
        for side, rows in enumerate((np.concatenate(foreground), np.concatenate(context))):
            counts = found.counts[c, side].double().numpy()
            assert counts.sum() == len(rows)
            # A centre is the mean of its cluster, so together they are the mean of all.
            mean = counts @ found.centers[c, side].double().numpy() / len(rows)
            np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-3, atol=1e-4)
    assert other > 5  # the features alone would be split elsewhere


def expected_map(
    scene: Scene, picture: Picture, label: int, direction: Tensor | None, offset: float = 0
) -> np.ndarray:
    """The map of one class, a scale and a view at a time."""
    size = Image.open(picture.path).size[::-1]
    total = torch.zeros(grid_size(size), dtype=torch.float64)
    for views in scene.views(picture, scene.inference.scales, scene.inference.flip):
        if direction is None:
            assert views.maps is not None
            one = views.maps[:, 0, label].double().sum(0)
        else:
            added = views.features[:, 0].double().sum(0)
            cosine = torch.einsum("d,dyx->yx", direction.double(), added) / added.norm(dim=0)
            one = (cosine + offset).relu() * (1 if views.extra is None else views.extra[0, 0, 0])
        total += F.interpolate(one[None, None], total.shape, mode="bilinear")[0, 0]
    return (total / (total.max() + 1e-5)).numpy()


def check_maps(scene: Scene, stage: Stage, setting: MapSetting) -> None:
    assert sorted(unpacked(stage.folder)) == sorted(
        f"{picture.id}.npz" for picture in scene.dataset.found
    )
    for picture in scene.dataset.found:
        seed = read_seed(stage.records, picture.id)
        assert seed.keys.tolist() == list(picture.labels or ())
        for label, found in zip(seed.keys, seed.maps, strict=True):
            direction = None if setting.directions is None else setting.directions[label]
            expected = expected_map(scene, picture, label, direction, setting.offset)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
            assert expected.max() > 0.99


def test_lpcams_maps_are_finished_and_features_not_kept(scene: Scene) -> None:
    _, chosen = prototype_pictures(scene.dataset, Draw())
    clustering = Clustering(k=2, activation=0.4)
    stage = scene.features()
    _, found = centers(scene.store, stage, scene.host, scene.dataset, clustering, chosen)
    prototypes = select(found, scene.host, scene.dataset.classes, Selection(0.2, 0.9))
    settings = {
        "cam": MapSetting(),
        "lpcam": lpcam_setting(prototypes, "both"),
        "context": lpcam_setting(prototypes, "context"),
    }

    made = scene.maps(settings)

    assert len({stage.key for stage in made.values()}) == 3
    for name, setting in settings.items():
        assert made[name].inputs["score"] == scene.host.score_key
        check_maps(scene, made[name], setting)
    assert not scene.results("views")
    # Another setting takes another pass, and is finished too.
    more = {"class": lpcam_setting(prototypes, "class")}
    check_maps(scene, scene.maps(more)["class"], more["class"])
    assert not scene.results("views")
    scene.host.weight.data += 0.1
    again = scene.maps(settings)
    assert all(again[name].key != made[name].key for name in settings)


def test_a_host_that_does_not_finish_keeps_features(linear: Scene) -> None:
    directions = torch.randn(CLASSES, CHANNELS).abs()
    settings = {"cam": MapSetting(), "lpcam": MapSetting(directions)}
    made = linear.maps(settings)
    assert "score" in made["cam"].inputs
    assert "score" not in made["lpcam"].inputs
    for name, setting in settings.items():
        check_maps(linear, made[name], setting)
    (kept,) = linear.results("views")
    assert kept["features"] == linear.host.feature_key
    more = MapSetting(directions.flip(0))

    def no_pass(**_: Any) -> pl.Trainer:
        raise AssertionError("the pictures were passed again")

    (stage,) = maps(
        linear.store, no_pass, linear.host, linear.dataset.found, {"": more}, linear.inference,
        num_workers=0,
    ).values()  # fmt: skip
    check_maps(linear, stage, more)


class GradientHost(Classifier):
    """Grad-CAM, which of a linear head is plain CAM."""

    maps_from_features = False
    needs_gradients = True

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        scales = []
        for found, _, _ in super().predict_step(batch, batch_idx):
            with torch.enable_grad():
                leaf = found.detach().requires_grad_()
                scores = self.score(leaf.mean((3, 4)).flatten(0, 1)).sum(0)
                gradients = [torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in scores]
            # The sum of a gradient over positions is the class weight.
            weighted = [(g.sum((3, 4), keepdim=True) * found).sum(2) for g in gradients]
            scales.append(HostViews(found, torch.stack(weighted, 2).relu()))
        return scales


def test_a_host_may_differentiate(tmp_path: Path, backbone: Backbone, linear: Scene) -> None:
    (tmp_path / "other").mkdir()
    host = GradientHost(backbone, CLASSES)
    host.head.load_state_dict(linear.host.head.state_dict())
    other = Scene(tmp_path / "other", host)
    expected, found = linear.maps({"cam": MapSetting()}), other.maps({"cam": MapSetting()})
    for picture in linear.dataset.found:
        first, second = (read_seed(made["cam"].records, picture.id) for made in (expected, found))
        assert first.keys.tolist() == second.keys.tolist()
        np.testing.assert_allclose(first.maps, second.maps, rtol=0, atol=4e-3)


def test_a_host_keeps_its_kind_for_inference() -> None:
    host = GradientHost(build_backbone("test_resnet", None), 3)
    twin = host.for_inference()
    assert type(twin) is GradientHost
    assert torch.equal(twin.weight, host.weight)
    assert twin.backbone is not host.backbone


def test_another_backbone_is_not_taken_for_other_classes(tmp_path: Path) -> None:
    """Its first layer has 24 channels, where this one has as many as there are classes."""
    other = Classifier(build_backbone("test_efficientnet", None), 32)
    torch.save(other.state_dict(), tmp_path / "other.ckpt")
    host = Classifier(build_backbone("efficientnet_lite0", None), 32)
    with pytest.raises(InputError, match="no Classifier on efficientnet_lite0"):
        load_host(tmp_path / "other.ckpt", host)
