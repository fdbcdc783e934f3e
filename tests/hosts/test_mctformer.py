"""MCTformer on tiny ViTs with random weights; no trained one of them is at hand."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lpcam.data.crops import deit_augmentation
from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.hosts.mctformer import MCTformer, contrastive_token_loss, rank_weighted_mean
from lpcam.models.backbones import Backbone, build_backbone
from lpcam.models.host import load_host
from lpcam.models.training import fit
from tests.conftest import Outcome, at
from tests.oracles import mctformer as oracle
from tests.refiners.learning import trainer_maker

CLASSES, PATCH, DEPTH, HEADS, DIM = 3, 8, 2, 2, 32
HEIGHT, WIDTH = 24, 32
OPTIONS = {
    "patch_size": PATCH,
    "img_size": (HEIGHT, WIDTH),
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
}
VARIANTS = ("v1", "v2", "plus")
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def tiny(weights: str | None = None, **options: Any) -> Backbone:
    return build_backbone("test_vit", weights, {**OPTIONS, **options})


def untrained(variant: str, classes: int = CLASSES, **options: Any) -> MCTformer:
    return MCTformer(tiny(**options), classes, variant=variant, attention_layers=1)


def make_host(variant: str = "v2", side: int | None = None, **options: Any) -> MCTformer:
    torch.manual_seed(4)
    backbone = tiny(img_size=(side, side)) if side else tiny()
    host = MCTformer(backbone, CLASSES, variant=variant, attention_layers=1, **options)
    with torch.no_grad():
        # As if trained: attention and maps that differ from place to place.
        for weight in host.parameters():
            weight += 0.15 * torch.randn_like(weight)
    return host.eval()


def weights_of(host: MCTformer) -> dict[str, np.ndarray]:
    state = host.backbone.network.state_dict()
    return {name: value.double().numpy() for name, value in state.items()}


def batch_of(images: Tensor, *, flip: bool = False) -> ViewBatch:
    return {
        "ids": [str(index) for index in range(len(images))],
        "labels": torch.ones(len(images), CLASSES),
        "size": (images.shape[2], images.shape[3]),
        "views": [images],
        "flip": flip,
    }


def reference(host: MCTformer, image: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return oracle.transformer(weights_of(host), image.double().numpy(), PATCH, DEPTH, HEADS)


def patch_grid(tokens: np.ndarray) -> np.ndarray:
    return tokens[CLASSES:].T.reshape(DIM, HEIGHT // PATCH, WIDTH // PATCH)


def head_maps(host: MCTformer, features: np.ndarray) -> np.ndarray:
    head = {name: value.double().numpy() for name, value in host.head.state_dict().items()}
    return oracle.convolution(features, head["weight"], head["bias"])


@pytest.mark.parametrize(("dtype", "atol"), PRECISIONS)
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_maps_and_lpcams_place_in_them(
    variant: str, refine: bool, dtype: torch.dtype, atol: float
) -> None:
    host = make_host(variant, refine=refine).to(dtype)
    images = torch.randn(2, 3, HEIGHT, WIDTH, dtype=dtype)

    (views,) = host.predict_step(batch_of(images, flip=True), 0)

    lpcam = torch.rand(2, 2, 2, HEIGHT // PATCH, WIDTH // PATCH, dtype=torch.float64)
    classes = torch.tensor([0, 2])
    finished = host.finish(lpcam, views, classes)
    assert views.maps is not None
    assert finished.shape == lpcam.shape
    expected = np.zeros(finished.shape)
    for b in range(2):
        for v in range(2):
            image = images[b].flip(2) if v else images[b]
            layers, attentions = reference(host, image)
            features = patch_grid(layers[-1])
            patch_maps = head_maps(host, features).clip(0)
            if variant == "v1":
                patch_maps = np.ones_like(patch_maps)
            own = oracle.maps(attentions, patch_maps, variant, 1, refine=refine)
            if v:
                features, own = features[..., ::-1], own[..., ::-1]
            np.testing.assert_allclose(views.features[v, b], features, rtol=0, atol=10 * atol)
            np.testing.assert_allclose(views.maps[v, b], own, rtol=0, atol=10 * atol)
            assert own.max() > 0.01
            for m in range(2):
                given = np.zeros_like(own)
                given[[0, 2]] = lpcam[m, b].numpy()[..., :: -1 if v else 1]
                whole = oracle.maps(attentions, given, variant, 1, refine=refine)[[0, 2]]
                expected[m, b] += whole[..., :: -1 if v else 1]
    np.testing.assert_allclose(finished, expected, rtol=0, atol=10 * atol)


@pytest.mark.parametrize(("dtype", "atol"), PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_loss(variant: str, dtype: torch.dtype, atol: float) -> None:
    host = make_host(variant, rank_decay=0.8).to(dtype)
    host.log = lambda *_, **__: None  # type: ignore[method-assign]
    images = torch.randn(2, 3, HEIGHT, WIDTH, dtype=dtype)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=dtype)

    with torch.no_grad():
        by_tokens, by_patches = host(images)
        loss = host.training_step((images, labels), 0)

    expected = 0.0
    for b in range(2):
        layers, _ = reference(host, images[b])
        maps = head_maps(host, patch_grid(layers[-1])).reshape(CLASSES, -1)
        pooled = [oracle.rank_weighted(m, 0.8) if variant == "plus" else m.mean() for m in maps]
        tokens = layers[-1][:CLASSES].mean(1)
        np.testing.assert_allclose(by_tokens[b], tokens, rtol=0, atol=10 * atol)
        np.testing.assert_allclose(by_patches[b], pooled, rtol=0, atol=10 * atol)
        target = labels[b].numpy()
        expected += oracle.soft_margin(tokens, target) / 2
        expected += oracle.soft_margin(np.array(pooled), target) / 2
        if variant == "plus":
            each = [oracle.contrast(layer[:CLASSES], target) for layer in layers]
            expected += sum(each) / DEPTH / 2
    assert float(loss) == pytest.approx(expected, rel=0, abs=10 * atol)


def test_maps_that_are_not_refined_are_others_to_the_store() -> None:
    assert make_host(refine=False).score_key != make_host().score_key
    assert make_host(refine=False).feature_key == make_host().feature_key


def test_v1_is_not_changed_by_the_patch_head_beside_it() -> None:
    host = make_host("v1")
    host(torch.randn(1, 3, HEIGHT, WIDTH))[1].sum().backward()
    assert host.head.weight.grad is not None
    assert all(weight.grad is None for weight in host.backbone.parameters())


def test_exact_cases_of_the_formulas() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0]])
    assert rank_weighted_mean(values, 0.5).tolist() == pytest.approx([(3 + 2 / 2 + 1 / 4) / 1.75])
    torch.testing.assert_close(rank_weighted_mean(values, 1.0), values.mean(1))
    assert rank_weighted_mean(values, 0.0).tolist() == [3]
    apart = [torch.eye(2)[None]]
    found = contrastive_token_loss(apart, torch.tensor([[1.0, 0.0]]))
    assert float(found) == pytest.approx(np.log(1 + np.exp(-1)))
    alike = [torch.ones(1, 4, 5)]
    assert float(contrastive_token_loss(alike, torch.ones(1, 4))) == pytest.approx(np.log(4))
    assert float(contrastive_token_loss(apart, torch.zeros(1, 2))) == 0


@torch.no_grad()
def test_a_vector_scores_what_a_constant_map_of_it_does() -> None:
    host = make_host()
    vectors = torch.randn(5, DIM)
    maps = host.head(vectors[:, :, None, None].expand(5, DIM, 5, 7))
    torch.testing.assert_close(host.score(vectors), maps[:, :, 2, 3])


def test_class_tokens_start_as_copies_and_patches_keep_their_place() -> None:
    torch.manual_seed(1)
    backbone = tiny()
    network = backbone.network
    token, position = network.cls_token.clone(), network.pos_embed.clone()
    host = MCTformer(backbone, 5, attention_layers=2)
    assert network.cls_token.shape == (1, 5, DIM)
    for c in range(5):
        assert torch.equal(network.cls_token[:, c], token[:, 0])
        assert torch.equal(network.pos_embed[:, c], position[:, 0])
    assert torch.equal(network.pos_embed[:, 5:], position[:, 1:])
    assert torch.equal(host.for_inference().backbone.network.cls_token, network.cls_token)

    with torch.no_grad():
        placed = network._pos_embed(torch.zeros(1, 6, 8, DIM))[0]
    grid = position[:, 1:].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 8), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(placed[:5], (token + position[:, :1])[0].expand(5, DIM))
    torch.testing.assert_close(placed[5:], expected.flatten(1).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(24, 32), (37, 51)])
@torch.no_grad()
def test_a_batch_changes_nothing(size: tuple[int, int]) -> None:
    host = make_host().for_inference()
    images = torch.randn(3, 3, *size)
    (together,) = host.predict_step(batch_of(images, flip=True), 0)
    for b in range(3):
        (alone,) = host.predict_step(batch_of(images[b : b + 1], flip=True), 0)
        for first, second in zip(together, alone, strict=True):
            assert isinstance(first, Tensor)
            assert isinstance(second, Tensor)
            torch.testing.assert_close(first[:, b : b + 1], second, rtol=0, atol=1e-5)
    assert together.features.shape[-2:] == (-(-size[0] // PATCH), -(-size[1] // PATCH))


@torch.no_grad()
def test_a_mirrored_picture_has_the_mirrored_views_in_the_other_order() -> None:
    host = make_host()
    image = torch.randn(1, 3, 30, 45)
    (plain,) = host.predict_step(batch_of(image, flip=True), 0)
    (other,) = host.predict_step(batch_of(image.flip(3), flip=True), 0)
    assert plain.maps is not None
    assert other.maps is not None
    torch.testing.assert_close(plain.maps, other.maps.flip(0, 4), rtol=0, atol=1e-5)
    maps = torch.rand(1, 1, CLASSES, *plain.maps.shape[3:])
    classes = torch.arange(CLASSES)
    torch.testing.assert_close(
        host.finish(maps, plain, classes),
        host.finish(maps.flip(4), other, classes).flip(4),
        rtol=0,
        atol=1e-5,
    )


def published(host: MCTformer, variant: str) -> dict[str, Tensor]:
    """The host's weights under the names of the published code."""
    state = {k.removeprefix("backbone.network."): v for k, v in host.state_dict().items()}
    state |= {"norm.weight": torch.ones(DIM), "norm.bias": torch.zeros(DIM)}
    if variant == "plus":
        position = state.pop("pos_embed")
        state["pos_embed_cls"], state["pos_embed_pat"] = position.split(
            [CLASSES, position.shape[1] - CLASSES], 1
        )
    if variant == "v1":
        del state["head.weight"], state["head.bias"]
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_published_checkpoint_loads(tmp_path: Path, variant: str) -> None:
    host = make_host(variant)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published(host, variant), "epoch": 59}, path)
    fresh = untrained(variant)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded = load_host(path, fresh)
    assert ["V1 without a patch head" in str(w.message) for w in warned] == [True] * (
        variant == "v1"
    )
    images = torch.randn(1, 3, HEIGHT, WIDTH)
    (found,), (expected,) = (h.predict_step(batch_of(images), 0) for h in (loaded, host))
    assert torch.equal(found.features, expected.features)
    assert found.maps is not None
    assert expected.maps is not None
    assert torch.equal(found.maps, expected.maps)
    if variant != "v1":
        with pytest.raises(InputError, match=r"checkpoint\.pth: a classifier of 3 classes"):
            load_host(path, untrained(variant, CLASSES + 1))


@torch.no_grad()
def test_published_position_embeddings_of_another_size_are_resized(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    host = make_host("plus", 32)
    torch.save(published(host, "plus"), path)
    loaded = load_host(path, untrained("plus", img_size=(48, 48)))
    found, given = (h.backbone.network.pos_embed for h in (loaded, host))
    assert found.shape == (1, CLASSES + 36, DIM)
    assert torch.equal(found[:, :CLASSES], given[:, :CLASSES])


@pytest.mark.parametrize("kind", ["safetensors", "pth", "deit"])
@torch.no_grad()
def test_a_file_of_the_plain_vit_gives_its_patches_and_its_token(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(8)
    source = tiny(img_size=(32, 32))
    state = source.network.state_dict()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if kind == "deit" else state, path)
    loaded = tiny(str(path), img_size=(32, 32))
    images = torch.randn(1, 3, HEIGHT, WIDTH)
    assert torch.equal(loaded.eval()(images), source.eval()(images))
    host = MCTformer(loaded, CLASSES, attention_layers=1)
    assert torch.equal(host.backbone.network.cls_token[:, 2], state["cls_token"][:, 0])
    larger = tiny(str(path), img_size=(48, 48)).network
    assert larger.pos_embed.shape == (1, 1 + 36, DIM)
    assert torch.equal(larger.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_vit3"])
def test_networks_without_one_class_token_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"backbone.name={name}: MCTformer takes a ViT"):
        MCTformer(build_backbone(name, None), CLASSES)
    with pytest.raises(InputError, match="attention_layers=3: test_vit has 2"):
        MCTformer(tiny(), CLASSES, attention_layers=3)


def test_rates_and_what_does_not_decay(tmp_path: Path) -> None:
    host = make_host(lr=0.1, warm_up_lr=0.01, min_lr=0.02, warm_up_epochs=1.0)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(trainer_maker(), host, tmp_path, loaders, epochs=4, callbacks=(Rates(),))
    warm = [0.01, 0.055]
    fall = [0.02 + 0.08 * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(2, 8)]
    assert rates == pytest.approx(warm + fall)
    decaying, others = host.trainer.optimizers[0].param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0)
    free = {id(weight) for weight in others["params"]}
    network = host.backbone.network
    assert {id(network.cls_token), id(network.pos_embed), id(host.head.bias)} <= free
    assert id(network.blocks[0].norm1.weight) in free
    assert {id(w) for w in decaying["params"]} | free == {id(w) for w in host.parameters()}


def loaders(processes: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(8, 3, HEIGHT, WIDTH, generator=generator)
    labels = (torch.rand(8, CLASSES, generator=generator) > 0.5).float()
    batches = DataLoader(TensorDataset(images, labels), batch_size=4)
    return batches, batches


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_training_goes_on(tmp_path: Path, variant: str) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    class Kill(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise Killed

    whole, cut, rest = (make_host(variant) for _ in range(3))
    expected = fit(trainer_maker(), whole, tmp_path / "whole", loaders, epochs=2)
    with pytest.raises(Killed):
        fit(trainer_maker(), cut, tmp_path / "cut", loaders, epochs=2, callbacks=(Kill(),))
    found = fit(trainer_maker(), rest, tmp_path / "cut", loaders, epochs=2)
    assert found == expected
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, rest.state_dict()[name])
    assert any(
        not torch.equal(weight, make_host(variant).state_dict()[name])
        for name, weight in whole.state_dict().items()
    )
    loaded = load_host(tmp_path / "cut" / "last.ckpt", make_host(variant))
    assert loaded.feature_key == whole.feature_key
    assert loaded.score_key == whole.score_key


def test_deits_augmentation() -> None:
    augment = deit_augmentation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop=32)
    picture = Image.fromarray(np.full((40, 60, 3), 128, np.uint8))
    found = [augment(picture) for _ in range(8)]
    assert {tuple(image.shape) for image in found} == {(3, 32, 32)}
    assert not all(torch.equal(image, found[0]) for image in found)


TINY = (
    "dataset=shapes",
    "dataset.train=12",
    "dataset.val=4",
    "dataset.sizes=[48,60]",
    "trainer=cpu",
    "logger=none",
    "num_workers=0",
    "classifier=mctformer_small",
    "backbone.options.img_size=64",
    "backbone.options.depth=2",
    "+backbone.options.embed_dim=32",
    "classifier.attention_layers=2",
    "classifier.epochs=2",
    "classifier.validate_every=1",
    "classifier.batch_size=6",
    "classifier.crop=64",
    "classifier.long_side=[56,64]",
)


@pytest.mark.filterwarnings("ignore:.* no prototype scores above")
@pytest.mark.parametrize("variant", ["v2", "plus"])
def test_through_the_programs(
    tmp_path: Path, program: Callable[..., Outcome], variant: str
) -> None:
    shared = (*TINY, f"classifier.variant={variant}")
    trained = program("train", *shared, *at(tmp_path, "train"))
    assert trained.status == 0, trained.stderr
    again = program("train", *shared, *at(tmp_path, "train"))
    assert "Already trained" in again.stdout
    made = program("infer", *shared, "prototypes.k=2", *at(tmp_path, "infer"))
    assert made.status == 0, made.stderr
    for name in ("val/cam/miou", "val/lpcam/miou"):
        assert f'"{name}"' in (tmp_path / "infer" / "metrics.json").read_text()
    views = list((tmp_path / "store").glob("features/*/manifest.json"))
    assert '"score"' in views[0].read_text()
