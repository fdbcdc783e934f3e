"""Training a segmentation network, going on after a kill, and labelling pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from lpcam.data.shapes import Shapes
from lpcam.errors import InputError
from lpcam.refiners.crf import crf_parameters, dense_crf
from lpcam.segmentation.file import load_network, save_network
from lpcam.segmentation.masks import TrueMasks
from lpcam.segmentation.networks import Architecture, SegmentationNetwork, build_network
from lpcam.segmentation.predict import predict_masks
from lpcam.segmentation.segmenter import (
    Learning,
    Segmenter,
    Testing,
    probabilities,
    with_image_prior,
)
from lpcam.stages.segmenter import segmenter_stage, train, trained_metrics
from lpcam.storage.store import Stage
from tests.oracles.dilated_head import published_rates
from tests.refiners.learning import Losses, trainer_maker

ARCHITECTURE = Architecture("deeplab_v2", 16, (1, 2))
LEARNING = Learning(
    steps=16,
    save_every=4,
    batch_size=4,
    crop=64,
    crop_scales=(0.75, 1.0, 1.25),
    optimizer="sgd",
    lr=0.02,
    head_lr_factor=10,
    momentum=0.9,
    weight_decay=5e-4,
    poly_power=0.9,
)
TESTING = Testing(scales=(1.0,), flip=False, merge="mean")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    root = tmp_path_factory.mktemp("data")
    shapes = Shapes(root / "shapes", train=8, val=4, sizes=(64, 76, 76))
    shapes.prepare()
    return shapes


def untrained(architecture: Architecture = ARCHITECTURE) -> SegmentationNetwork:
    torch.manual_seed(0)
    return build_network("test_resnet", None, 4, architecture)


def run(
    store: Path,
    dataset: Shapes,
    learning: Learning,
    *callbacks: pl.Callback,
    architecture: Architecture = ARCHITECTURE,
    num_workers: int = 0,
) -> tuple[Stage, SegmentationNetwork]:
    masks, network = TrueMasks(dataset), untrained(architecture)
    stage = segmenter_stage(
        store, dataset, masks, network, architecture, learning, seed=3, precision="32-true"
    )
    torch.manual_seed(len(callbacks))  # what a process drew before is of no matter
    make: Callable[..., pl.Trainer] = trainer_maker(*callbacks)
    train(
        stage,
        make,
        dataset,
        masks,
        network,
        architecture,
        learning,
        backbone="test_resnet",
        seed=3,
        num_workers=num_workers,
        logger=None,
    )
    return stage, network


class Rates(pl.Callback):
    """Keeps the learning rates of each step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("every", [1, 5])
def test_rates_fall_as_published(dataset: Shapes, tmp_path: Path, every: int) -> None:
    """Each group's own rate times (1 - step / steps) ** 0.9, a new one each so many steps."""
    seen = Rates()
    run(tmp_path, dataset, replace(LEARNING, lr_every=every, steps=12), seen)
    factors = published_rates(12, 0.9, every)
    np.testing.assert_allclose(seen.rates, np.outer(factors, [0.02, 0.2, 0.4]), rtol=1e-9)


def test_two_turns_teach_something(dataset: Shapes, tmp_path: Path) -> None:
    losses = Losses()
    stage, network = run(tmp_path, dataset, LEARNING, losses)
    assert len(losses.losses) == 16
    assert np.mean(losses.losses[-4:]) < 0.8 * np.mean(losses.losses[:2])
    assert {path.name for path in stage.folder.iterdir()} == {
        "network.safetensors", "metrics.json", "manifest.json",
    }  # fmt: skip
    found = load_network(stage.folder / "network.safetensors")
    assert found.classes == dataset.classes
    for name, value in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value)


class KilledError(Exception):
    pass


class Kill(pl.Callback):
    """Ends the work after a step; what a killed process had in memory is lost."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(
    ("architecture", "learning"),
    [
        (ARCHITECTURE, LEARNING),
        (ARCHITECTURE, replace(LEARNING, lr_every=3, optimizer="adamw", lr=1e-3)),
        pytest.param(  # with dropout, and BatchNorm that learns
            Architecture("deeplabv3", batch_norm="learnt"), replace(LEARNING, steps=8)
        ),
    ],
    ids=["published", "adamw", "dropout"],
)
def test_a_killed_training_ends_with_the_same_weights(
    dataset: Shapes, tmp_path: Path, architecture: Architecture, learning: Learning
) -> None:
    if architecture.architecture != "deeplab_v2":
        pytest.importorskip("segmentation_models_pytorch")
    _, expected = run(tmp_path / "whole", dataset, learning, architecture=architecture)
    with pytest.raises(KilledError):
        run(tmp_path / "cut", dataset, learning, Kill(7), architecture=architecture)
    losses = Losses()
    _, found = run(
        tmp_path / "cut", dataset, learning, losses, architecture=architecture, num_workers=1
    )
    assert len(losses.losses) == learning.steps - 4
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_checkpoint_that_was_cut_is_begun_anew(dataset: Shapes, tmp_path: Path, capsys) -> None:
    whole, network = run(tmp_path / "whole", dataset, LEARNING)
    with pytest.raises(KilledError):
        run(tmp_path / "cut", dataset, LEARNING, Kill(7))
    (last,) = (tmp_path / "cut").glob("segmenter/*/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    again, found = run(tmp_path / "cut", dataset, LEARNING)
    assert "trained anew" in capsys.readouterr().err
    assert again.key == whole.key
    for name, value in found.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_a_network_that_was_trained_before_a_kill_is_not_trained_again(
    dataset: Shapes, tmp_path: Path
) -> None:
    stage, _ = run(tmp_path, dataset, LEARNING)
    metrics = trained_metrics(stage)
    network = (stage.folder / "network.safetensors").read_bytes()
    (stage.folder / "manifest.json").unlink()
    stage.folder.rename(stage.folder.with_name(f"{stage.folder.name}.partial"))
    again, _ = run(tmp_path, dataset, LEARNING, Kill(1))
    assert trained_metrics(again) == metrics
    assert (again.folder / "network.safetensors").read_bytes() == network


def key(dataset: Shapes, learning: Learning, **changes: Any) -> str:
    given = {"seed": 0, "precision": "32-true", **changes}
    network, masks = untrained(), TrueMasks(dataset)
    return segmenter_stage(
        Path("store"), dataset, masks, network, ARCHITECTURE, learning, **given
    ).key


def test_what_decides_the_weights_decides_where_they_lie(dataset: Shapes) -> None:
    first = key(dataset, LEARNING)
    assert key(dataset, replace(LEARNING, save_every=2)) == first
    others = [
        key(dataset, replace(LEARNING, save_every=3)),  # six rounds of three
        key(dataset, replace(LEARNING, crop=65)),
        key(dataset, replace(LEARNING, balanced=True)),
        key(dataset, replace(LEARNING, pixel_weights="confidence")),
        key(dataset, LEARNING, seed=1),
        key(dataset, LEARNING, precision="bf16-mixed"),
    ]
    assert len({first, *others}) == 7


class Means(torch.nn.Module):
    """Scores that are means over blocks of 8x8 pixels, of three of four classes."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8)


def test_views_are_merged_as_published_or_averaged() -> None:
    torch.manual_seed(1)
    views = [torch.randn(2, 3, side, 2 * side) for side in (16, 32)]
    size = (20, 40)
    network = Means()

    def scores(view: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(
            network(view), size, mode="bilinear", align_corners=False
        )

    seen = [scores(view) for view in views]
    highest = torch.maximum(*seen).softmax(1)
    found = probabilities(network, views, size, flip=False, merge="max")
    torch.testing.assert_close(found, highest)
    both = [*seen, *(scores(view.flip(3)).flip(3) for view in views)]
    mean = torch.stack([s.softmax(1) for s in both]).mean(0)
    found = probabilities(network, views, size, flip=True, merge="mean")
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size))


def test_pixels_are_of_classes_that_the_picture_shows() -> None:
    # Four pixels: three of the first class, of which the second claims more in the last.
    found = torch.tensor([[[0.2, 0.2, 0.2, 0.4]], [[0.6, 0.6, 0.6, 0.25]], [[0.2, 0.2, 0.2, 0.35]]])

    changed = with_image_prior(torch.stack([found, found.flip(2)]), 2)

    mean = {1: (0.6 * 3 + 0.25) / 4, 2: (0.2 * 3 + 0.35) / 4}
    own, other = 0.25 * mean[1] ** 2, 0.35 * mean[2] ** 2
    wanted = torch.tensor([0.4, 0.6 * own / (own + other), 0.6 * other / (own + other)])
    torch.testing.assert_close(changed[0, :, 0, 3], wanted)
    assert found.argmax(0).tolist() == [[1, 1, 1, 0]]
    assert changed[0].argmax(0).tolist() == [[1, 1, 1, 1]]
    torch.testing.assert_close(changed[1], changed[0].flip(2))
    torch.testing.assert_close(changed.sum(1), torch.ones(2, 1, 4))
    torch.testing.assert_close(changed[:, 0], torch.stack([found, found.flip(2)])[:, 0])
    background = torch.zeros(1, 3, 1, 2)
    background[:, 0] = 1
    torch.testing.assert_close(with_image_prior(background, 2), background)


def masks_of(folder: Path, dataset: Shapes, name: str = "segmented") -> dict[str, np.ndarray]:
    return {
        picture.id: np.asarray(Image.open(folder / name / f"{picture.id}.png"))
        for picture in dataset.pictures("train")
    }


def test_masks_do_not_depend_on_the_batch(dataset: Shapes, tmp_path: Path) -> None:
    network = untrained().eval()
    views = [torch.randn(5, 3, 64, 76), torch.randn(5, 3, 32, 38)]
    with torch.no_grad():
        together, *alone = (
            probabilities(network, chosen, (64, 76), flip=True, merge="mean")
            for chosen in (views, *([view[i : i + 1] for view in views] for i in range(5)))
        )
    torch.testing.assert_close(torch.cat(alone), together)
    found = []
    for size in (1, 5):
        folder = tmp_path / str(size)
        folder.mkdir()
        testing = replace(TESTING, scales=(0.5, 1.0), flip=True, test_batch_size=size)
        segmenter = Segmenter(network, testing=testing)
        pictures = dataset.pictures("train")
        predict_masks(trainer_maker(), segmenter, pictures, folder, num_workers=0)
        found.append(masks_of(folder, dataset))
    for picture in dataset.pictures("train"):
        first, second = (masks[picture.id] for masks in found)
        assert first.shape == Image.open(picture.path).size[::-1]
        # Sums over a batch round otherwise: a tie may fall to the other side.
        assert (first != second).mean() < 1e-3


def test_the_crf_comes_after_the_network(dataset: Shapes, tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf")
    network, picture = untrained().eval(), dataset.pictures("train")[0]
    segmenter = Segmenter(network, testing=replace(TESTING, crf="deeplab"))
    predict_masks(trainer_maker(), segmenter, [picture], tmp_path, num_workers=0)
    image = Image.open(picture.path).convert("RGB")
    pixels = np.asarray(image, np.float32) / 255
    pixels = (pixels - np.float32(network.mean)) / np.float32(network.std)
    with torch.no_grad():
        view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        found = probabilities(network, [view], pixels.shape[:2], flip=False, merge="mean")[0]
    refined = dense_crf(np.array(image), found, crf_parameters("deeplab", "crf"))
    for name, expected in (("segmented", found), ("segmented_crf", refined)):
        mask = np.asarray(Image.open(tmp_path / name / f"{picture.id}.png"))
        assert (mask != expected.argmax(0).numpy()).mean() < 0.01


def test_a_network_is_read_back_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, untrained(), ["a", "b", "c", "d"], "test_resnet", ARCHITECTURE)
    assert load_network(path).classes == ("a", "b", "c", "d")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"no readable segmentation network .*task=segmentation"):
        load_network(path)
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(InputError, match=r"holds no segmentation network; give network\.safe"):
        load_network(path)
    torch.save({"state_dict": {"head.weight": torch.zeros(4, 8)}}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="no readable segmentation network"):
        load_network(tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="no readable segmentation network"):
        load_network(tmp_path / "nowhere.safetensors")


def test_odd_settings_are_refused() -> None:
    for name, value in (
        ("steps", 0),
        ("crop", 8),
        ("crop_scales", ()),
        ("crop_scales", (0.0,)),
        ("optimizer", "lion"),
        ("loss_grid", "cell"),
        ("pixel_weights", "equal"),
        ("poly_power", float("nan")),
    ):
        with pytest.raises(ValidationError):
            replace(LEARNING, **{name: value})
    for name, value in (("merge", "sum"), ("crf", "nice"), ("scales", ()), ("test_batch_size", 0)):
        with pytest.raises(ValidationError):
            replace(TESTING, **{name: value})
