"""Segmentation networks: the head against its oracle, what learns and how fast."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpcam.errors import InputError
from lpcam.models.backbones import build_backbone
from lpcam.models.sum_head import SumHead
from lpcam.segmentation.networks import Architecture, SegmentationNetwork, build_network
from tests.oracles.dilated_head import sum_head

TINY = "test_resnet"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None, reason="an extra"
)


def tiny(**settings: object) -> SegmentationNetwork:
    torch.manual_seed(0)
    given = {"architecture": "deeplab_v2", "output_stride": 16, "rates": (1, 2), **settings}
    return build_network(TINY, None, 3, Architecture(**given))


def test_the_head_is_the_sum_of_its_dilated_convolutions() -> None:
    torch.manual_seed(1)
    head = SumHead(5, 3, (1, 2, 4, 7)).double()
    for branch in head.branches:
        nn.init.normal_(branch.bias)
    features = torch.randn(2, 5, 6, 9, dtype=torch.double)
    branches = [
        (rate, branch.weight.detach().numpy(), branch.bias.detach().numpy())
        for rate, branch in zip((1, 2, 4, 7), head.branches, strict=True)
    ]
    with torch.no_grad():
        found = head(features).numpy()
    for picture in range(2):
        expected = sum_head(features[picture].numpy(), branches)
        np.testing.assert_allclose(found[picture], expected, rtol=1e-9, atol=1e-12)


def test_a_new_head_is_small_and_without_bias() -> None:
    torch.manual_seed(2)
    head = SumHead(512, 21, (6, 12, 18, 24))
    for branch in head.branches:
        assert not branch.bias.any()
        assert float(branch.weight.std()) == pytest.approx(0.01, rel=0.02)
        assert branch.kernel_size == (3, 3)
    assert [branch.dilation[0] for branch in head.branches] == [6, 12, 18, 24]


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_grid_has_the_stride_that_is_asked_for(stride: int) -> None:
    network = tiny(output_stride=stride).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 96, 128)).shape == (1, 4, 96 // stride, 128 // stride)


def test_a_stride_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(InputError, match=r"^segmenter\.output_stride=8: not to be had of vit"):
        build_backbone("vit_tiny_patch16_224", None, output_stride=8)


def test_learning_rates_are_those_published_for_deeplab() -> None:
    """The backbone's convolutions lr, the head's weights 10 lr, its biases 20 lr without decay."""
    network = tiny()
    rates: dict[int, tuple[float, float]] = {}
    for group in network.groups(2.5e-4, 10, 5e-4):
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    norms = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    for name, parameter in network.named_parameters():
        if id(parameter) in norms:
            assert not parameter.requires_grad, name
            assert id(parameter) not in rates, name
        elif name.startswith("head"):
            bias = name.endswith("bias")
            expected = (5e-3, 0.0) if bias else (2.5e-3, 5e-4)
            assert rates.pop(id(parameter)) == pytest.approx(expected), name
        else:
            assert rates.pop(id(parameter)) == pytest.approx((2.5e-4, 5e-4)), name
    assert not rates


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k}


@pytest.mark.parametrize("architecture", ["deeplab_v2", pytest.param("fpn", marks=needs_package)])
@pytest.mark.parametrize("batch_norm", ["frozen", "learnt"])
def test_batch_norm_of_the_encoder_is_frozen_or_learns(architecture: str, batch_norm: str) -> None:
    network = tiny(architecture=architecture, batch_norm=batch_norm).train()
    before = statistics(network)
    network(torch.randn(4, 3, 64, 64)).mean().backward()
    after = statistics(network)
    assert before
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name in before if not name.startswith(("network.decoder", "head"))}
    assert encoder & changed == (encoder if batch_norm == "learnt" else set())
    norms = [
        m for name, m in network.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not name.startswith("network.decoder")
    ]  # fmt: skip
    assert norms
    assert all((m.weight.grad is None) == (batch_norm == "frozen") for m in norms)


def test_every_weight_that_learns_gets_a_gradient() -> None:
    """None is left over, such as the classifier's: processes that share a training would wait."""
    network = tiny()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@needs_package
@pytest.mark.parametrize("architecture", ["deeplabv3plus", "upernet", "unet"])
def test_networks_of_the_package_take_the_backbones_weights_and_any_size(architecture: str) -> None:
    torch.manual_seed(3)
    backbone = build_backbone(TINY, None)
    torch.manual_seed(3)
    network = build_network(TINY, None, 3, Architecture(architecture)).eval()
    given = {key.replace(".", "_"): value for key, value in backbone.network.state_dict().items()}
    for key, value in network.network.encoder.model.state_dict().items():
        assert torch.equal(value, given[key.replace(".", "_")]), key
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 70, 101)).shape == (1, 4, 70, 101)


@needs_package
def test_what_the_package_has_not_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^segmenter\.architecture=segnet: choose from deeplab_v2"
    ):
        tiny(architecture="segnet")
    with pytest.raises(InputError, match=r"^segmenter\.architecture=unet: not with backbone"):
        build_network("vit_tiny_patch16_224", None, 3, Architecture("unet"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match=r"pip install 'lpcam\[segmentation\]'"):
        tiny(architecture="unet")
