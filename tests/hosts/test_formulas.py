"""Formulas of the hosts against slow references, in double and in single precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpcam.hosts.amn import AMN, balanced_loss, stretched, unsmoothed
from lpcam.hosts.edam import EDAM, CollaborativeAttention, discriminative_masks
from lpcam.hosts.erasing import draw_classes, erase
from lpcam.hosts.recam import ReCAM, single_class_loss
from lpcam.models.backbones import build_backbone
from lpcam.prototypes.selection import class_score
from tests.oracles import amn, edam, recam

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
both = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["double", "single"])


@both
def test_recams_loss(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    grids = [rng.normal(size=(5, 3, 4)), rng.normal(size=(5, 2, 6)), rng.normal(size=(5, 3, 3))]
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    weight, sce = rng.normal(size=(2, 3, 5))
    found = single_class_loss(
        [torch.tensor(grid, dtype=dtype) for grid in grids],
        torch.tensor(labels, dtype=dtype),
        torch.tensor(weight, dtype=dtype),
        torch.tensor(sce, dtype=dtype),
    )
    assert float(found) == pytest.approx(recam.loss(grids, labels, weight, sce), rel=tolerance)


def test_recams_loss_without_any_class_is_nothing() -> None:
    weight = torch.rand(3, 5, requires_grad=True)
    loss = single_class_loss([torch.rand(5, 2, 2)], torch.zeros(1, 3), weight, torch.rand(3, 5))
    loss.backward()
    assert float(loss.detach()) == 0
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("score_weight", ["bce", "product"])
def test_recam_maps_by_the_product_of_both_heads(score_weight: str) -> None:
    host = ReCAM(build_backbone("test_resnet", None), 3, score_weight=score_weight)
    features = torch.randn(2, 96, 3, 4)
    product = (host.head.weight * host.sce_head.weight).detach().numpy()
    expected = np.einsum("cd,ndyx->ncyx", product, features.numpy()).clip(0)
    np.testing.assert_allclose(host.own_maps(features).numpy(), expected, rtol=1e-4, atol=1e-5)
    classes = torch.tensor([2, 0])
    picked = host.own_maps(features, classes).numpy()
    np.testing.assert_allclose(picked, expected[:, [2, 0]], rtol=1e-4, atol=1e-5)
    weight = product if score_weight == "product" else host.head.weight.detach().numpy()
    vectors = torch.randn(4, 96)
    np.testing.assert_allclose(
        host.score(vectors), vectors.numpy() @ weight.T, rtol=1e-4, atol=1e-5
    )


@both
def test_amns_loss(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 4, 3, 5)) * 3
    labels = rng.choice([0, 0, 1, 2, 3, 255], size=(2, 3, 5))
    for known in (labels, np.where(labels == 0, 255, labels), np.full_like(labels, 255)):
        found = balanced_loss(torch.tensor(logits, dtype=dtype), torch.tensor(known), 0.4)
        assert float(found) == pytest.approx(amn.loss(logits, known, 0.4), rel=tolerance, abs=1e-12)


def test_amns_smoothing_is_undone() -> None:
    """The logits that minimise the smoothed loss belong to a belief of certainty."""
    smoothed = torch.full((1, 5), 0.1)
    smoothed[0, 2] = 0.6
    found = unsmoothed(smoothed, 0.4)[0]
    torch.testing.assert_close(found, F.one_hot(torch.tensor(2), 5).float().clamp(1e-6))
    torch.testing.assert_close(unsmoothed(torch.full((1, 5), 0.2), 0.4), torch.full((1, 5), 0.2))


def amn_host(**options: object) -> AMN:
    host = AMN(build_backbone("test_resnet", None), 3, **options).eval()
    for layer in host.head.branches:
        nn.init.normal_(layer.weight, std=0.05)
        nn.init.normal_(layer.bias)
    return host


@both
def test_amns_convolutions_and_their_kernel_sum(dtype: torch.dtype, tolerance: float) -> None:
    rates = [1, 2, 3]
    host = amn_host(dilations=rates).to(dtype)
    weights, biases = (
        [getattr(layer, name).detach().double().numpy() for layer in host.head.branches]
        for name in ("weight", "bias")
    )
    features = np.random.default_rng(4).normal(size=(96, 7, 8))
    expected = amn.responses(features, weights, biases, rates)
    with torch.no_grad():
        found = host.head(torch.tensor(features, dtype=dtype)[None])[0].double().numpy()
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=10 * tolerance)

        # In the middle of a constant map no tap falls outside.
        vector = np.random.default_rng(5).normal(size=96)
        constant = np.broadcast_to(vector[:, None, None], (96, 7, 8))
        scores = amn.responses(constant, weights, biases, rates)[:, 3, 3]
        # What each wrong class of a sure pixel has among the three classes alone.
        share = amn.softmax(scores[1:])
        floor = (0.4 / 3) / (1 - 0.4 / 3)
        belief = ((share - floor) / (1 - 3 * floor)).clip(1e-6, 1)
        score = host.score(torch.tensor(vector, dtype=dtype)[None])[0].double().numpy()
        np.testing.assert_allclose(
            score, np.log(belief), rtol=100 * tolerance, atol=100 * tolerance
        )


def test_amn_can_be_sure_in_spite_of_its_smoothing() -> None:
    """A pixel classifier that fits its smoothed targets gives a class the probability 1."""
    host = amn_host(dilations=[1])
    (layer,) = host.head.branches
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([0.4 / 3, 0.6, 0.4 / 3, 0.4 / 3]).log()
    assert float(class_score(host, torch.randn(1, 96), 0)) > 0.999


def test_amns_maps_are_stretched_inside_the_seeds() -> None:
    rng = np.random.default_rng(3)
    maps, inside = rng.random((2, 4, 5)), rng.random((4, 5)) > 0.5
    found = stretched(torch.tensor(maps), torch.tensor(inside)).numpy()
    for one, expected in zip(found, maps, strict=True):
        np.testing.assert_allclose(one, amn.stretch(expected, inside, 1e-5), rtol=1e-10)
    nowhere = torch.zeros(4, 5, dtype=torch.bool)
    assert torch.equal(stretched(torch.tensor(maps), nowhere), torch.tensor(maps))


@both
def test_edams_masks(dtype: torch.dtype, tolerance: float) -> None:
    responses = np.random.default_rng(6).normal(size=(4, 3, 5))
    found = discriminative_masks(torch.tensor(responses, dtype=dtype)[None])[0].double().numpy()
    np.testing.assert_allclose(found, edam.masks(responses), rtol=tolerance)
    np.testing.assert_allclose((found**2).sum(0), 1, rtol=tolerance)


@both
def test_edams_attention(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(7)
    module = CollaborativeAttention(8, 2, 12, 0.1).to(dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    masked = np.random.default_rng(8).normal(size=(2, 2, 8, 2, 3))
    parameters = {k: v.double().numpy() for k, v in module.state_dict().items()}
    with torch.no_grad():
        found = module(torch.tensor(masked, dtype=dtype)).double().numpy()
    expected = [edam.pair_scores(pair, 2, parameters) for pair in masked]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=10 * tolerance)


def test_edam_scores_a_vector_by_a_map_that_holds_it_everywhere() -> None:
    host = EDAM(build_backbone("test_resnet", None), 3, dim=8).eval().double()
    vectors = torch.randn(4, 96, dtype=torch.float64)
    constant = vectors[:, :, None, None].expand(-1, -1, 3, 3)
    with torch.no_grad():
        masks = discriminative_masks(host.masks(constant))[:, :, 1, 1]
    torch.testing.assert_close(host.score(vectors).exp(), masks[:, 1:] ** 2, rtol=1e-10, atol=0)
    shares = masks[:, 1:] ** 2 / (1 - masks[:, :1] ** 2)
    for c in range(3):
        torch.testing.assert_close(class_score(host, vectors, c), shares[:, c], rtol=1e-9, atol=0)


def test_a_class_is_drawn_among_those_that_are_shown() -> None:
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    drawn = torch.stack([draw_classes(labels) for _ in range(200)])
    assert set(drawn[:, 0].tolist()) == {0, 2}
    assert 60 < int((drawn[:, 0] == 0).sum()) < 140
    assert set(drawn[:, 1].tolist()) == {-1}
    assert set(drawn[:, 2].tolist()) == {1}


def test_erasing_fades_to_the_mean_colour() -> None:
    images = torch.rand(2, 3, 8, 12)
    maps = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 3)
    found = erase(images, maps)
    assert torch.equal(found[0], images[0])
    assert not found[1].any()
    quarter = erase(images, torch.full((2, 2, 3), 0.25))
    torch.testing.assert_close(quarter, images * 0.75)
