import gc
import math
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchcam.methods import CAM

from lpcam import LPCAM
from lpcam.errors import InputError
from lpcam.explain.views import PAPER_VIEWS, SINGLE_VIEW
from lpcam.functional import class_activation_map
from lpcam.prototypes.prototype_set import Prototypes

Batch = tuple[Tensor, Tensor]
RED, GREEN, BLUE, BLACK = [*torch.eye(3).tolist(), [0.0, 0.0, 0.0]]
EPS = 1e-5  # what normalisation adds to the maximum


class Colours(nn.Module):
    """A classifier whose local features are the colours: class 0 is red, class 1 blue."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 3)
        nn.init.eye_(self.features.weight.data[:, :, 0, 0])
        self.norm.running_var.fill_(1 - self.norm.eps)
        self.fc.weight.data = torch.tensor([[9.0, 0, 0], [0, 0, 9.0], [0, 0, 0]])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.features(images)).mean((2, 3)))


def picture(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).permute(2, 0, 1)


def colour_batches() -> list[Batch]:
    red = picture([RED, GREEN], [RED, GREEN])
    blue = picture([BLUE, GREEN], [GREEN, GREEN])
    nothing = picture([RED, RED], [RED, RED])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    return [(torch.stack([red, blue]), labels[:2]), (nothing[None], labels[2:])]


@pytest.fixture
def colours() -> LPCAM:
    torch.manual_seed(0)
    names = ["red", "blue", "unseen"]
    return LPCAM(Colours(), k=1, classes=names).fit(colour_batches(), progress=False)


def random_batches(
    classes: int = 8, size: int = 64, count: int = 3, seed: int = 0
) -> Iterator[Batch]:
    """Batches of four pictures that show two classes of the first six, one, none and none."""
    generator = torch.Generator().manual_seed(seed)
    for batch in range(count):
        labels = torch.zeros(4, classes)
        labels[0, [batch % 6, (batch + 1) % 6]] = 1
        labels[1, (batch + 3) % 6] = 1
        yield torch.randn(4, 3, size, size, generator=generator), labels


def random_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=8, **options)


@pytest.fixture(scope="module")
def resnet() -> LPCAM:
    cam = LPCAM(random_model("resnet18"), k=2, class_score=0.1, example=(3, 64, 64))
    return cam.fit(random_batches(), progress=False)


# Exact maps of a toy


def test_prototypes_of_the_toy_are_the_colours(colours: LPCAM) -> None:
    assert colours.prototypes.vectors("red").tolist() == [RED]
    assert colours.prototypes.vectors("blue").tolist() == [BLUE]
    assert colours.prototypes.vectors("red", "context").tolist() == [GREEN]
    assert colours.prototypes.vectors("unseen").shape == (0, 3)


@pytest.mark.parametrize("views", [[(1, False)], [(1, True)], [(1, False), (1, True)]])
@pytest.mark.parametrize("aggregate", ["mean", "max", "topk", "lse"])
def test_maps_of_the_toy_are_exact(colours: LPCAM, views: list, aggregate: str) -> None:
    purple, orange = [3.0, 0, 4], [4.0, 3, 0]
    images = picture([RED, GREEN, purple], [orange, BLACK, BLUE])[None]

    maps = colours(images, views=views, aggregate=aggregate)

    # Cosine to red minus cosine to green, and to blue minus to green; negative ones are zero.
    red = torch.tensor([[1, 0, 0.6], [0.8 - 0.6, 0, 0]]) / (1 + EPS)
    blue = torch.tensor([[0, 0, 0.8], [0, 0, 1]]) / (1 + EPS)
    torch.testing.assert_close(maps[0, :2], torch.stack([red, blue]), rtol=0, atol=1e-6)
    assert not maps[0, 2].any()


def test_cam_of_the_toy_is_exact(colours: LPCAM) -> None:
    images = picture([RED, GREEN, [0.5, 0, 0]], [BLACK, BLACK, BLUE])[None]

    lpcam, cam = colours.compare(images)

    red, blue = torch.tensor([[9, 0, 4.5], [0, 0, 0]]), torch.tensor([[0, 0, 0], [0, 0, 9.0]])
    torch.testing.assert_close(cam[0, :2], torch.stack([red, blue]) / (9 + EPS))
    torch.testing.assert_close(lpcam, colours(images), rtol=0, atol=0)


def test_scales_are_added_after_relu(colours: LPCAM) -> None:
    images = picture(*[[RED] * 4 + [GREEN] * 4] * 8)[None]

    maps = colours(images, views=[(0.5, False), (1, False)])

    half = F.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    unit = F.normalize(half, dim=1)
    small = F.interpolate((unit[:, 0] - unit[:, 1]).relu()[None], (8, 8), mode="bilinear")
    total = small[0, 0] + images[0, 0]
    torch.testing.assert_close(maps[0, 0], total / (total.max() + EPS), rtol=0, atol=1e-6)


def test_similarity_of_the_toy_is_exact(colours: LPCAM) -> None:
    images = picture([RED, GREEN], [BLACK, [-3.0, 0, 4]])[None]
    found = colours.similarity(images, "red")
    assert found.tolist() == [[[[1, 0], [0, pytest.approx(-0.6)]]]]


def test_dropping_a_prototype_changes_the_maps(colours: LPCAM) -> None:
    images = picture([RED, GREEN], [[4.0, 3, 0], BLACK])[None]

    colours.prototypes = colours.prototypes.drop("red", [0], "context")
    without_context = colours(images)[0, 0]
    colours.prototypes = colours.prototypes.drop("red", [0])

    torch.testing.assert_close(without_context * (1 + EPS), torch.tensor([[1, 0], [0.8, 0]]))
    assert not colours(images)[0, 0].any()
    assert colours.head.fitted == [1]


def test_signed_features() -> None:
    torch.manual_seed(0)
    images = picture([RED, [0.0, -3, 0]], [RED, [0.0, -3, 0]])[None]
    labels = torch.tensor([[1.0, 0, 0]])
    probe = picture([RED, [4.0, -3, 0]])[None]
    found = {
        signed: LPCAM(Colours(), k=1, signed=signed).fit([(images, labels)], progress=False)
        for signed in ("keep", "relu", "center")
    }

    # Context is (0, -3, 0); or has no direction; or, like the prototype, lacks the mean.
    assert found["keep"].prototypes.vectors(0, "context").tolist() == [[0, -3, 0]]
    assert len(found["relu"].prototypes.vectors(0, "context")) == 0
    assert found["center"].prototypes.mean.tolist() == [0.5, -1.5, 0]
    assert found["center"].prototypes.vectors(0).tolist() == [[0.5, 1.5, 0]]
    assert found["center"].prototypes.vectors(0, "context").tolist() == [[-0.5, -1.5, 0]]
    maps = {signed: (cam(probe)[0, 0, 0] * (1 + EPS)).tolist() for signed, cam in found.items()}
    assert maps["keep"] == pytest.approx([1, 0.8 - 0.6])
    assert maps["relu"] == pytest.approx([1, 1])
    # Less the mean, context is opposite to the prototype, and (4, -3, 0) nearer to the context.
    assert maps["center"] == pytest.approx([1, 0], abs=1e-5)


# Against another implementation


def both_cams(library: str, dtype: torch.dtype) -> tuple[LPCAM, Tensor, Tensor]:
    """A model's maps by us, pictures, and its maps ``(B, C, h, w)`` by torchcam, after ReLU."""
    torch.manual_seed(0)
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    model = build("resnet18", num_classes=8).eval().to(dtype)
    cam = LPCAM(model, k=1, class_score=0.0)
    images, _ = next(random_batches(seed=1))
    with CAM(model, "layer4", "fc") as extractor:
        with torch.inference_mode():
            model(images.to(dtype))
        theirs = [extractor([c] * len(images), normalized=False)[0].relu() for c in range(8)]
    return cam, images, torch.stack(theirs, 1)


# A score is a sum of 512 products that cancel, so in single precision each
# library is exact to 1e-7 of the products' total size, which is more of the small sum itself.
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_cam_equals_torchcam_up_to_rounding(library: str) -> None:
    cam, images, theirs = both_cams(library, torch.float32)
    features, weight = cam.features(images), cam.layers.weight

    ours = class_activation_map(features, weight)

    total = class_activation_map(features.abs(), weight.abs())
    assert ((ours - theirs).abs() <= 1e-6 * total).all()
    assert theirs.any()


# Double precision shows that nothing but rounding differs, normalisation and resizing included.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_normalised_cam_equals_torchcam(library: str, dtype: torch.dtype, atol: float) -> None:
    cam, images, theirs = both_cams(library, dtype)
    cam.fit(random_batches(), progress=False)

    _, ours = cam.compare(images, torch.ones(len(images), 8))

    theirs = F.interpolate(theirs, (64, 64), mode="bilinear")
    theirs = theirs / (theirs.amax((2, 3), keepdim=True) + EPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert (ours.amax((0, 2, 3)) > 0.9).any()


# Architectures

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "convnext_tiny": {},
    "tf_efficientnet_lite0": {},
    "regnety_002": {},
    "deit_tiny_patch16_224": {"img_size": 64, "global_pool": "avg"},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
}


@pytest.mark.filterwarnings("ignore:.* no prototype scores above")
@pytest.mark.parametrize("name", MODELS)
def test_fit_and_call(name: str) -> None:
    model = random_model(name, **MODELS[name])
    cam = LPCAM(model, k=3, example=(3, 64, 64))
    cam.fit(random_batches(), progress=False)
    images, labels = next(random_batches(seed=1))
    labels[2] = 1

    maps = cam(images, labels)

    assert maps.shape == (4, 8, 64, 64)
    assert ((maps >= 0) & (maps <= 1)).all()
    asked = labels.bool()
    asked[:, [c for c in range(8) if c not in cam.head.fitted]] = False
    assert not maps[~asked].any()
    assert maps[asked].any()
    torch.testing.assert_close(cam(images)[asked], maps[asked])
    for row in range(4):
        alone = cam(images[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(alone[0], maps[row], rtol=0, atol=1e-4)


# Fitting


def test_features_computed_before_give_the_same_prototypes() -> None:
    cam = LPCAM(random_model("resnet18"), k=2, class_score=0.1)
    features, labels = [], []
    for images, batch_labels in random_batches():
        features += list(cam.features(images).permute(0, 2, 3, 1).numpy())
        labels.append(batch_labels.numpy())
    streamed = cam.fit(random_batches(), progress=False).prototypes

    for given in (features, np.stack(features), features.__getitem__):
        ready = cam.fit_features(given, np.concatenate(labels), progress=False).prototypes
        for side in ("foreground", "context"):
            for a, b in zip(getattr(streamed, side), getattr(ready, side), strict=True):
                assert torch.equal(a, b)


def test_pictures_of_different_sizes_and_batches_without_any_label() -> None:
    cam = LPCAM(random_model("resnet18"), k=2, class_score=0.1)
    unlabelled = (torch.randn(2, 3, 96, 64), torch.zeros(2, 8))
    cam.fit([*random_batches(), unlabelled, *random_batches(size=96)], progress=True)
    assert cam.head.fitted


@pytest.mark.parametrize("fault", [None, "labels", "features", "interrupt"])
def test_temporary_files_are_gone(
    fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def loader() -> Iterator[Batch]:
        yield from colour_batches()
        seen.extend(path.suffix for path in tmp_path.rglob("*.npy"))
        images, labels = colour_batches()[0]
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "features":
            images[0, 0, 0, 0] = 1e6
        yield images, labels[:, :2] if fault == "labels" else labels

    torch.manual_seed(0)
    cam = LPCAM(Colours(), k=1)
    if fault:
        with pytest.raises(KeyboardInterrupt if fault == "interrupt" else InputError):
            cam.fit(loader(), progress=False)
    else:
        cam.fit(loader(), progress=False)
    assert len(seen) == 3
    assert not list(tmp_path.iterdir())


# Invariance


def test_batches_and_the_order_of_views_change_nothing(resnet: LPCAM) -> None:
    images, labels = next(random_batches(seed=2))
    whole = resnet(images, labels, views=PAPER_VIEWS)
    shuffled = resnet(images, labels, views=[*PAPER_VIEWS][::-1])
    halves = [resnet(images[rows], labels[rows], views=PAPER_VIEWS) for rows in ([0, 1], [2, 3])]
    assert torch.equal(whole, shuffled)
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-4)


def test_maps_of_a_mirror_image_are_mirrored(resnet: LPCAM) -> None:
    images, labels = next(random_batches(seed=2))
    views = [(1.0, False), (1.0, True)]
    maps = resnet(images, labels, views=views)
    mirrored = resnet(images.flip(3), labels, views=views)
    torch.testing.assert_close(mirrored.flip(3), maps, rtol=0, atol=1e-4)
    assert maps.any()


def test_black_pictures_have_maps_of_zero(colours: LPCAM) -> None:
    maps = colours(torch.zeros(2, 3, 5, 7), views=PAPER_VIEWS)
    assert torch.equal(maps, torch.zeros(2, 3, 5, 7))


def test_nothing_asked_is_nothing_mapped(resnet: LPCAM) -> None:
    maps = resnet(torch.randn(2, 3, 64, 96), torch.zeros(2, 8))
    assert torch.equal(maps, torch.zeros(2, 8, 64, 96))


def test_one_forward_pass_a_scale_makes_all_maps(resnet: LPCAM) -> None:
    images, labels = next(random_batches(seed=2))
    seen: list[int] = []
    handle = resnet.model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    for views in (SINGLE_VIEW, PAPER_VIEWS):
        resnet(images, labels, views=views)
        resnet.compare(images, labels, views=views)
    handle.remove()
    # Mirror images lie in the same batch.
    assert seen == [4] * 2 + [8] * 4 * 2


# Nothing is left behind


def test_a_thousand_calls_leave_no_hook_and_no_memory(colours: LPCAM) -> None:
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([[1.0, 1, 1], [0, 0, 1]])
    for _ in range(50):
        colours(images, labels)
    tensors = live_tensors()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for _ in range(1000):
        colours(images, labels)
    assert live_tensors() == tensors
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One result kept a call would be 24 MB, one hook a call 100 kB.
    assert kept < 50_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 12_000  # kB
    assert not any(module._forward_hooks for module in colours.model.modules())


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_are_as_before(colours: LPCAM, grad: bool, fails: bool) -> None:
    model = colours.model
    model.train()
    model.norm.eval()
    before = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(2, 4 if fails else 3, 6, 6)

    with torch.set_grad_enabled(grad):
        if fails:
            with pytest.raises(RuntimeError, match="channels"):
                colours(images)
        else:
            assert not colours(images).requires_grad
        assert torch.is_grad_enabled() is grad

    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# Precision and devices


def test_autocast_reaches_the_model_only(resnet: LPCAM) -> None:
    images, labels = next(random_batches(seed=2))
    exact = resnet(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        maps = resnet(images, labels)
        spread = resnet(images, labels, propagate=3, views=PAPER_VIEWS)
    assert maps.dtype == torch.float32
    difference = (maps - exact).abs().max()
    assert 0 < difference < 0.2  # the model did run in bfloat16
    exact = resnet(images, labels, propagate=3, views=PAPER_VIEWS)
    assert spread.dtype == torch.float32
    assert (spread - exact).abs().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision(resnet: LPCAM, tmp_path: Path, dtype: torch.dtype) -> None:
    images, labels = next(random_batches(seed=2))
    exact = resnet(images, labels)
    cam = LPCAM(random_model("resnet18").to(dtype), k=2, example=(3, 64, 64))
    cam.prototypes = resnet.prototypes
    maps = cam(images, labels)
    assert maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        maps.float(), exact, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_of_half_precision_are_resized(resnet: LPCAM, dtype: torch.dtype) -> None:
    images, labels = next(random_batches(seed=2))
    maps = resnet(images.to(dtype), labels, views=PAPER_VIEWS)
    exact = resnet(images.to(dtype).float(), labels, views=PAPER_VIEWS)
    torch.testing.assert_close(maps, exact)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(resnet: LPCAM, device: str) -> None:
    backend = torch.cuda if device == "cuda" else torch.backends.mps
    if not backend.is_available():
        pytest.skip(f"no {device} device")
    images, labels = next(random_batches(seed=2))
    exact = resnet(images, labels, views=PAPER_VIEWS)
    cam = LPCAM(random_model("resnet18").to(device), k=2, class_score=0.1)
    cam.fit(random_batches(), progress=False)
    with torch.autocast(device, torch.float16):
        assert cam(images, labels).device.type == device
    cam.prototypes = resnet.prototypes
    torch.testing.assert_close(
        cam(images, labels, views=PAPER_VIEWS).cpu(), exact, rtol=0, atol=2e-2
    )


# Files


def test_a_saved_set_makes_the_same_maps(tmp_path: Path) -> None:
    model = random_model("deit_tiny_patch16_224", img_size=64)
    with pytest.warns(UserWarning, match="approximation"):
        cam = LPCAM(
            model,
            "norm",
            k=2,
            signed="center",
            class_score=0.0,
            example=(3, 64, 64),
        )
    cam.fit(random_batches(), progress=False)
    fitted = cam.head.fitted[0]
    cam.prototypes = cam.prototypes.rename(fitted, cam.prototypes.indices[fitted][0][0], "beak")
    cam.save(tmp_path / "a.safetensors")

    with pytest.warns(UserWarning, match="approximation"):
        loaded = LPCAM.load(str(tmp_path / "a.safetensors"), model)

    images, labels = next(random_batches(seed=1))
    for aggregate in ("mean", "lse"):
        assert torch.equal(
            loaded(images, labels, aggregate=aggregate), cam(images, labels, aggregate=aggregate)
        )
    assert loaded.prototypes.settings == cam.prototypes.settings
    assert "(beak)" in str(loaded.prototypes)
    assert loaded.classes == cam.classes


def test_another_models_file_is_refused(resnet: LPCAM, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    resnet.save(path)
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"a\.safetensors: .*; load the weights that they were"):
        LPCAM.load(path, timm.create_model("resnet18", num_classes=8))


def test_a_damaged_file_is_one_line(resnet: LPCAM, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    resnet.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"a\.safetensors: no readable file") as caught:
        LPCAM.load(path, resnet.model)
    assert "\n" not in str(caught.value)


def test_a_runs_prototypes_load_into_a_classifier_of_their_shape(
    resnet: LPCAM, tmp_path: Path
) -> None:
    path = tmp_path / "prototypes.safetensors"
    found = resnet.prototypes
    Prototypes(tuple("abcdefgh"), found.foreground, found.context, found.indices).save(path)
    images, _ = next(random_batches(seed=1))

    loaded = LPCAM.load(path, resnet.model)

    assert torch.equal(loaded(images), resnet(images))
    assert loaded.classes == tuple("abcdefgh")
    with pytest.raises(InputError, match=r"8 classes of \[512\] channels for a model of 3 classes"):
        LPCAM.load(path, Colours())


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"k": 0}, "^k=0: should be greater than or equal to 1$"),
        ({"k": 2.5}, r"^k=2\.5: should be a valid integer$"),
        ({"activation": 1.5}, r"^activation=1\.5: should be less than or equal to 1$"),
        ({"class_score": math.nan}, "^class_score=nan: should be a finite number$"),
        ({"context_floor": "low"}, "^context_floor='low': should be a valid number$"),
        ({"max_iter": 0}, "^max_iter=0: should be greater than or equal to 1$"),
        ({"seed": -1}, "^seed=-1: should be greater than or equal to 0$"),
        ({"signed": "abs"}, "signed=abs: unknown; choose keep, relu, center"),
        ({"classes": ["a", "b"]}, "2 names for the 3 scores of the layer fc"),
        ({"example": torch.randn(2, 4, 8, 8)}, r"does not run on pictures of \(2, 4, 8, 8\)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match=reason):
        LPCAM(Colours(), **arguments)


def test_wrong_calls(colours: LPCAM) -> None:
    images = torch.rand(2, 3, 4, 4)
    cases: list[tuple[Any, str]] = [
        (lambda: colours(images, torch.ones(2)), r"labels: shape \(2,\); .* \(2, 3\)"),
        (lambda: colours(images, torch.ones(1, 3)), r"labels: shape \(1, 3\)"),
        (lambda: colours(images.byte()), "images: torch.uint8"),
        (lambda: colours(images[0]), r"shape \(3, 4, 4\)"),
        (lambda: colours.features(images[0]), r"shape \(3, 4, 4\)"),
        (lambda: colours(images, views=[]), r"views=\[\]"),
        (lambda: colours(images, views=[(0, False)]), r"views=\[\(0, False\)\]"),
        (lambda: colours(images, aggregate="median"), "aggregate=median"),
        (lambda: colours.similarity(images, "green"), "class 'green'"),
        (lambda: colours.fit([]), "no picture shows any class"),
        (lambda: colours.fit([(images, torch.zeros(2, 3))]), "no picture shows any class"),
        (lambda: LPCAM(Colours())(images), "not fitted; call fit"),
        (lambda: LPCAM(Colours()).save("never"), "not fitted; call fit"),
    ]
    for call, reason in cases:
        torch.manual_seed(0)
        with pytest.raises(InputError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_infinite_features_are_named() -> None:
    torch.manual_seed(0)
    images, labels = colour_batches()[0]
    images[1, 0, 0, 0] = 1e6
    with pytest.raises(InputError, match="features of picture 1: not finite in half precision"):
        LPCAM(Colours(), k=1).fit([(images, labels)], progress=False)


# The package


def test_the_package_is_light() -> None:
    code = "import lpcam, sys; print('torch' in sys.modules, lpcam.LPCAM, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False <class 'lpcam.explain.explainer.LPCAM'> True\n"


def test_repr(resnet: LPCAM) -> None:
    assert repr(resnet).startswith("LPCAM(ResNet, target_layer='layer4', classifier='fc'): ")


def test_paper_views() -> None:
    assert sorted(PAPER_VIEWS) == sorted(product((0.5, 1.0, 1.5, 2.0), (False, True)))
