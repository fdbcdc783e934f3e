from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lpcam.prototypes.multi_scale import sampled_cam
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.functional import local_prototype_map, prototype_directions
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.stages.callbacks import FeatureCallback, LPCAMCallback, MapHead
from tests.oracles import multiscale

CLASSES = 4
CHANNELS = 6
SIZE = (37, 50)
GRID = (10, 13)
LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
# Class prototypes and context prototypes of each class.
COUNTS = ((3, 2), (1, 4), (2, 0), (4, 1))


@dataclass(frozen=True)
class Case:
    """Features of three pictures at three scales, class weights and prototypes."""

    features: list[Tensor]
    weight: Tensor
    prototypes: Prototypes

    def head(self, kind: str) -> MapHead:
        if kind == "cam":
            return MapHead(Path(kind), None)
        offset = 1.0 if kind == "context" else 0.0
        return MapHead(Path(kind), self.prototypes.directions(kind), offset)

    def expected(
        self, kind: str, picture: int, class_index: int, size: tuple[int, int] = SIZE
    ) -> np.ndarray:
        scales = [views[:, picture].double().numpy() for views in self.features]
        if kind == "cam":
            weight = self.weight[class_index].double().numpy()
            return multiscale.plain_map(scales, weight, size)
        own = self.prototypes.own[class_index].double().numpy()
        context = self.prototypes.context[class_index].double().numpy()
        return multiscale.prototype_map(
            scales,
            own[:0] if kind == "context" else own,
            context[:0] if kind == "class" else context,
            1.0 if kind == "context" else 0.0,
            size,
        )


def random_case(seed: int, views: int = 2) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = [draw(views, 3, CHANNELS, *grid) for grid in ((2, 3), (3, 4), (5, 7))]
    own = tuple(draw(p, CHANNELS) * 5 for p, _ in COUNTS)
    context = tuple(draw(q, CHANNELS) * 5 for _, q in COUNTS)
    indices = tuple((list(range(p)), list(range(q))) for p, q in COUNTS)
    prototypes = Prototypes(("a", "b", "c", "d"), own, context, indices)
    return Case(features, draw(CLASSES, CHANNELS), prototypes)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["cam", "both", "class", "context"])
def test_maps_equal_the_slow_loops(kind: str, views: int) -> None:
    case = random_case(11, views)
    maps = LPCAMCallback(case.weight, [case.head(kind)]).maps(case.features, LABELS, SIZE)
    shown = LABELS.nonzero().tolist()
    assert maps.shape == (1, len(shown), *GRID)
    for found, (picture, class_index) in zip(maps[0], shown, strict=True):
        expected = case.expected(kind, picture, class_index)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=5e-6)
        assert expected.max() > 0.99


def test_plain_cam_rectifies_views_and_lpcam_adds_their_features() -> None:
    # One place; the mirror image has twice the opposite feature.
    features = [torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).view(2, 1, 2, 1, 1)]
    labels = torch.ones(1, 2).bool()
    weight = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    heads = [MapHead(Path(), None), MapHead(Path(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))]
    maps = LPCAMCallback(weight, heads).maps(features, labels, (4, 4))[:, :, 0, 0]
    # CAM: max(3, 0) + max(-6, 0) = 3 and 0 + 6; LPCAM: cosine of (1, 0) + (-2, 0) = (-1, 0).
    expected = [[3 / (3 + 1e-5), 6 / (6 + 1e-5)], [0.0, 1 / (1 + 1e-5)]]
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-6)


def test_scales_are_added_before_the_division() -> None:
    features = [
        torch.tensor([[3.0, 0.0]]).view(1, 1, 1, 1, 2),
        torch.tensor([[0.0, 4.0]]).view(1, 1, 1, 1, 2),
    ]
    callback = LPCAMCallback(torch.ones(1, 1), [MapHead(Path(), None)])
    maps = callback.maps(features, torch.ones(1, 1).bool(), (1, 8))
    np.testing.assert_allclose(maps[0, 0].numpy(), [[3 / (4 + 1e-5), 4 / (4 + 1e-5)]], rtol=1e-6)


@pytest.mark.parametrize("size", [(37, 50), (48, 80), (33, 1)])
def test_sampled_cam_equals_the_slow_loops(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(18)
    grids = [(-(-size[0] // cell), -(-size[1] // cell)) for cell in (16, 32, 8)]
    features = [torch.randn(2, CHANNELS, *grid, generator=generator) for grid in grids]
    weight = torch.randn(3, CHANNELS, generator=generator)

    found = sampled_cam(features, weight, size)

    assert found.shape == (3, *grids[0])
    scales = [views.double().numpy() for views in features]
    for ours, row in zip(found.numpy(), weight.double().numpy(), strict=True):
        expected = multiscale.sampled_plain_map(scales, row, size)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    assert sampled_cam(features, weight[:0], size).shape == (0, *grids[0])


def test_sampled_cam_reads_corners_of_the_full_size_map() -> None:
    # One scale, one view: the map rises from 1 to 3 between the centres of two cells.
    features = [torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)]
    found = sampled_cam(features, torch.ones(1, 1), (16, 32))[0, 0]
    # Pixel 16 lies 8.5 pixels after the first centre, of 16; a mean of its cell would be 2.7 or so.
    torch.testing.assert_close(found, torch.tensor([1.0, 1 + 2 * 8.5 / 16]) / (3 + 1e-5))


def test_heads_together_equal_heads_alone() -> None:
    case = random_case(12)
    kinds = ["cam", "both", "context", "class"]
    heads = [case.head(kind) for kind in kinds]
    together = LPCAMCallback(case.weight, heads).maps(case.features, LABELS, SIZE)
    assert together.shape == (4, int(LABELS.sum()), *GRID)
    for maps, head in zip(together, heads, strict=True):
        alone = LPCAMCallback(case.weight, [head]).maps(case.features, LABELS, SIZE)
        torch.testing.assert_close(maps, alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [["cam"], ["both"], ["cam", "context", "both"]])
def test_a_batch_equals_its_pictures_one_at_a_time(kinds: list[str]) -> None:
    case = random_case(13)
    callback = LPCAMCallback(case.weight, [case.head(kind) for kind in kinds])
    together = callback.maps(case.features, LABELS, SIZE)
    first = 0
    for picture in (0, 2):
        only = slice(picture, picture + 1)
        alone = callback.maps([views[:, only] for views in case.features], LABELS[only], SIZE)
        last = first + int(LABELS[picture].sum())
        torch.testing.assert_close(together[:, first:last], alone, rtol=0, atol=1e-6)
        first = last
    assert first == together.shape[1]


@pytest.mark.parametrize("kinds", [["cam"], ["both"], ["cam", "context", "both"]])
def test_pictures_without_labels_get_no_map(kinds: list[str]) -> None:
    case = random_case(14)
    callback = LPCAMCallback(case.weight, [case.head(kind) for kind in kinds])
    maps = callback.maps(case.features, torch.zeros(3, CLASSES).bool(), SIZE)
    assert maps.shape == (len(kinds), 0, *GRID)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_maps_of_features_on_another_device() -> None:
    case = random_case(15)
    heads = [case.head(kind) for kind in ("cam", "both", "context")]
    callback = LPCAMCallback(case.weight, heads)
    expected = callback.maps(case.features, LABELS, SIZE)
    found = callback.maps([views.cuda() for views in case.features], LABELS.cuda(), SIZE)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Scene:
    """Pictures on disk and a classifier of them."""

    pictures: list[Picture]
    classifier: Classifier
    folder: Path

    def predict(
        self, *callbacks: pl.Callback, batch_size: int = 3, scales: Sequence[float] = (0.5, 1.0)
    ) -> None:
        loader = view_loader(
            self.pictures,
            CLASSES,
            scales=scales,
            flip=True,
            mean=self.classifier.backbone.mean,
            std=self.classifier.backbone.std,
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
            own = torch.tensor(pixels[None], dtype=torch.float32)
            with torch.no_grad():
                views = [self.classifier.backbone(own)]
                views.append(self.classifier.backbone(own.flip(-1)).flip(-1))
            scales.append(torch.stack(views))
        return scales

    def make(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name


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


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_each_head_writes_its_own_maps_into_its_own_folder(scene: Scene) -> None:
    weight = scene.classifier.weight
    own = tuple(torch.randn(3, weight.shape[1]).abs() for _ in range(CLASSES))
    context = tuple(torch.randn(2, weight.shape[1]).abs() for _ in range(CLASSES))
    indices = tuple(([0, 1, 2], [0, 1]) for _ in range(CLASSES))
    prototypes = Prototypes(("a", "b", "c", "d"), own, context, indices)
    heads = [
        MapHead(scene.make("both"), prototypes.directions("both")),
        MapHead(scene.make("cam"), None),
        MapHead(scene.make("context"), prototypes.directions("context"), 1.0),
    ]

    scene.predict(LPCAMCallback(weight, heads))

    names = [f"{picture.id}.npz" for picture in scene.pictures]
    for picture in scene.pictures:
        size = Image.open(picture.path).size[::-1]
        grid = (size[0] // 4, size[1] // 4)
        case = Case(scene.features(picture), weight, prototypes)
        for head in heads:
            assert sorted(file.name for file in head.folder.iterdir()) == sorted(names)
            found = load(head.folder / f"{picture.id}.npz")
            assert {key: value.dtype for key, value in found.items()} == {
                "keys": np.int64,
                "maps": np.float16,
                "size": np.int64,
            }
            assert found["keys"].tolist() == list(picture.labels or ())
            assert found["maps"].shape == (len(found["keys"]), *grid)
            assert tuple(found["size"]) == size
            for key, values in zip(found["keys"], found["maps"], strict=True):
                expected = case.expected(head.folder.name, 0, key, size)
                np.testing.assert_allclose(values, expected, rtol=0, atol=2e-3)


def test_a_picture_without_labels_alone_in_its_batch(scene: Scene) -> None:
    folder = scene.make("cam")
    scene.predict(LPCAMCallback(scene.classifier.weight, [MapHead(folder, None)]), batch_size=1)
    found = load(folder / "third.npz")
    assert found["keys"].shape == (0,)
    assert found["maps"].shape == (0, 16, 20)
    assert found["size"].tolist() == [64, 80]


def test_without_eps_the_maximum_is_one() -> None:
    """That of LPCAM: plain CAM is divided by its maximum and 1e-5, in the published code too."""
    case = random_case(19)
    heads = [case.head(kind) for kind in ("cam", "both")]
    plain, lpcam = LPCAMCallback(case.weight, heads, eps=0).maps(case.features, LABELS, SIZE)
    assert (lpcam.amax((1, 2)) == 1).all()
    assert (plain.amax((1, 2)) < 1).all()
    zero = [torch.zeros_like(views) for views in case.features]
    assert not LPCAMCallback(case.weight, heads, eps=0).maps(zero, LABELS, SIZE).any()


def test_without_context_positive_features_need_no_relu() -> None:
    """The published code leaves it out there; features after a ReLU make no negative cosine."""
    case = random_case(20)
    features = [views.abs() for views in case.features]
    own = [prototypes.abs() for prototypes in case.prototypes.own]
    directions = prototype_directions(own, [vectors[:0] for vectors in own])
    for views in features:
        assert (local_prototype_map(views.sum(0), directions) >= 0).all()


@pytest.mark.parametrize("size", [1, 2])
def test_feature_files_with_the_sampled_cam(scene: Scene, size: int) -> None:
    folder = scene.make("features")
    weight = scene.classifier.weight
    scene.predict(
        FeatureCallback(folder, local=True, cam_weight=weight), batch_size=size, scales=[1.0, 0.5]
    )
    for picture in scene.pictures:
        found = load(folder / f"{picture.id}.npz")
        half, whole = (views[:, 0].double().numpy() for views in scene.features(picture))
        assert found["cam"].dtype == np.float32
        assert found["cam"].shape == (len(picture.labels or ()), *found["local"].shape[:2])
        np.testing.assert_allclose(
            found["local"].transpose(2, 0, 1), whole[0], rtol=2e-3, atol=1e-3
        )
        for label, cam in zip(picture.labels or (), found["cam"], strict=True):
            expected = multiscale.sampled_plain_map(
                [whole, half], weight[label].double().numpy(), Image.open(picture.path).size[::-1]
            )
            np.testing.assert_allclose(cam, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("local", [True, False])
def test_feature_files(scene: Scene, local: bool) -> None:
    folder = scene.make("features")
    loader = view_loader(
        scene.pictures,
        CLASSES,
        scales=[1.0],
        flip=False,
        mean=scene.classifier.backbone.mean,
        std=scene.classifier.backbone.std,
        batch_size=2,
    )
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[FeatureCallback(folder, local=local)],
    ).predict(scene.classifier, loader, return_predictions=False)

    names = sorted(f"{picture.id}.npz" for picture in scene.pictures)
    assert sorted(file.name for file in folder.iterdir()) == names
    for picture in scene.pictures:
        own = scene.features(picture)[1][0, 0].numpy()
        found = load(folder / f"{picture.id}.npz")
        assert found.keys() == ({"pooled", "local"} if local else {"pooled"})
        assert found["pooled"].dtype == np.float32
        mean = own.reshape(len(own), -1).astype(np.float64).mean(1)
        np.testing.assert_allclose(found["pooled"], mean, rtol=1e-3, atol=1e-4)
        if local:
            assert found["local"].dtype == np.float16
            assert found["local"].shape == (*own.shape[1:], len(own))
            for row, column in np.ndindex(own.shape[1:]):
                np.testing.assert_allclose(
                    found["local"][row, column], own[:, row, column], rtol=2e-3, atol=1e-3
                )
