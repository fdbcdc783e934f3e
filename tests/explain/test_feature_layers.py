from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lpcam.errors import InputError
from lpcam.explain.feature_layers import (
    evaluating,
    find_feature_layers,
    find_finer_layer,
    finer_features,
)

SIDE = 64
Build = Callable[[], nn.Module]


def timm_model(name: str, **options: Any) -> Build:
    return partial(timm.create_model, name, num_classes=5, **options)


def tv_model(name: str, **options: Any) -> Build:
    return partial(torchvision.models.get_model, name, num_classes=5, **options)


class Head(nn.Module):
    """Two layers that keep the grid, something of the caller's, and scores."""

    def __init__(self, end: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.body = nn.Conv2d(6, 6, 1)
        self.layers = nn.Sequential(*layers)
        self.end = end

    def forward(self, images: Tensor) -> Any:
        return self.end(self.layers(self.body(self.stem(images).relu())))


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def pooled(*layers: nn.Module) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers]


EXACT: dict[str, tuple[Build, str, str]] = {
    "ResNet-18": (timm_model("resnet18"), "layer4", "fc"),
    "ResNet-50": (timm_model("resnet50"), "layer4", "fc"),
    "EfficientNet-Lite0": (timm_model("tf_efficientnet_lite0"), "bn2", "classifier"),
    "RegNetY": (timm_model("regnety_002"), "final_conv", "head.fc"),
    "ConvNeXt-Tiny": (timm_model("convnext_tiny"), "norm_pre", "head.fc"),
    "Swin-Tiny": (
        timm_model("swin_tiny_patch4_window7_224", img_size=SIDE), "norm", "head.fc"
    ),
    "DeiT-Tiny": (
        timm_model("deit_tiny_patch16_224", img_size=SIDE, global_pool="avg"), "norm", "head"
    ),
    "ViT with registers": (
        timm_model("vit_little_patch16_reg4_gap_256", img_size=SIDE), "norm", "head"
    ),
    "torchvision ResNet-18": (tv_model("resnet18"), "layer4", "fc"),
    "torchvision ConvNeXt-Tiny": (tv_model("convnext_tiny"), "features", "classifier.2"),
    "torchvision EfficientNet-B0": (tv_model("efficientnet_b0"), "features", "classifier.1"),
    "torchvision RegNetY": (tv_model("regnet_y_400mf"), "trunk_output", "fc"),
    "torchvision Swin-Tiny": (tv_model("swin_t"), "permute", "head"),
    "torchvision DenseNet": (tv_model("densenet121"), "features", "classifier"),
    "1x1 head before the mean": (lambda: Head(mean, nn.Conv2d(6, 5, 1)), "body", "layers.0"),
    "1x1 head after the mean": (
        lambda: Head(mean, nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1)), "body", "layers.1"
    ),
    "ReLU in place after the layer": (
        lambda: Head(lambda x: x, nn.ReLU(inplace=True), *pooled(nn.Linear(6, 5))),
        "layers.0",
        "layers.3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_mean_of_the_scores_of_all_positions_is_the_models_score(name: str) -> None:
    build, layer, classifier = EXACT[name]
    torch.manual_seed(0)
    model = build().eval()
    found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE))
    images = torch.randn(3, 3, SIDE, SIDE)

    with torch.no_grad():
        features = found.features(model, images)
        scores = torch.einsum("bdhw,cd->bchw", features, found.weight).mean((2, 3))
        wanted = model(images)

    assert (found.name, found.classifier_name) == (layer, classifier)
    assert features.shape[2] == features.shape[3] > 1
    torch.testing.assert_close(
        scores + found.classifier.bias, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max() + 1)
    )


@pytest.mark.parametrize("name", ["ResNet-18", "ConvNeXt-Tiny", "torchvision DenseNet"])
def test_half_precision_models_are_understood(name: str) -> None:
    build, layer, classifier = EXACT[name]
    torch.manual_seed(0)
    model = build().eval().bfloat16()
    found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE).bfloat16())
    with torch.no_grad():
        features = found.features(model, torch.randn(1, 3, SIDE, SIDE).bfloat16())
    assert (found.name, found.classifier_name) == (layer, classifier)
    assert features.dtype == found.weight.dtype == torch.float32


def test_patch_tokens_keep_their_places_in_pictures_of_any_shape() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_little_patch16_reg4_gap_256", num_classes=5, dynamic_img_size=True, img_size=SIDE
    ).eval()
    found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE))
    images = torch.randn(1, 3, 48, 96)

    with torch.no_grad():
        features = found.features(model, images)
        tokens = model.forward_features(images)

    assert found.prefix == model.num_prefix_tokens
    assert features.shape == (1, model.num_features, 3, 6)
    place = tokens[0, model.num_prefix_tokens + 2 * 6 + 5]  # third row, last column
    cosine = torch.cosine_similarity(features[0].flatten(1).T, place - place.mean(), dim=1)
    assert int(cosine.argmax()) == 2 * 6 + 5


def test_a_layer_that_the_model_changes_in_place_is_read_as_it_was() -> None:
    class InPlace(Head):
        def forward(self, images: Tensor) -> Tensor:
            features = self.body(self.stem(images))
            scores = self.layers(features.mean((2, 3)))
            features.zero_()
            return scores

    torch.manual_seed(0)
    model = InPlace(mean, nn.Linear(6, 5)).eval()
    found = find_feature_layers(model, torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        assert found.name == "body"
        assert found.features(model, torch.randn(1, 3, 16, 16)).any()


class Branched(nn.Module):
    """One ReLU for all layers, which an auxiliary branch calls last."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.fine = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1))
        self.coarse = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.beside = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.coarse(self.relu(self.fine(self.relu(images)))))
        self.relu(self.beside(features))
        return self.fc(features.mean((2, 3)))


def test_a_module_that_runs_again_is_not_taken_for_its_earlier_call() -> None:
    torch.manual_seed(0)
    model, images = Branched().eval(), torch.randn(2, 3, 32, 32)
    found = find_feature_layers(model, images)
    with torch.no_grad():
        features = found.features(model, images)
        fine = model.relu(model.fine(model.relu(images)))
        torch.testing.assert_close(features, model.relu(model.coarse(fine)))
        assert find_finer_layer(model, found, images) is model.fine
        torch.testing.assert_close(
            finer_features(model, model.fine, images), model.fine(model.relu(images))
        )


@pytest.mark.parametrize("by_name", [True, False])
def test_layers_may_be_given(by_name: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    layer, classifier = ("layer4.1", "fc") if by_name else (model.layer4[1], model.fc)
    found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE), layer, classifier)
    assert (found.layer, found.classifier) == (model.layer4[1], model.fc)


def test_patch_tokens_can_be_scored_by_a_class_token_head() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=SIDE).eval()
    with pytest.warns(UserWarning, match="target_layer=norm: .* an approximation"):
        found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE), "norm")
    images = torch.randn(2, 3, SIDE, SIDE)

    with torch.no_grad():
        features = found.features(model, images)
        tokens = model.forward_features(images)

    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])


REFUSED: dict[str, tuple[Build, dict[str, Any], str]] = {
    "two heads": (
        timm_model("deit_tiny_distilled_patch16_224", img_size=SIDE), {}, "head and head_dist"
    ),
    "no head": (partial(timm.create_model, "resnet18", num_classes=0), {}, "pass classifier="),
    "output that is no tensor": (
        lambda: Head(lambda x: {"logits": x}, *pooled(nn.Linear(6, 5))), {}, "pass classifier="
    ),
    "3x3 head": (
        lambda: Head(mean, nn.Conv2d(6, 5, 3, padding=1)), {}, "layers.0: a 3x3 convolution"
    ),
    "maximum": (timm_model("resnet18", global_pool="max"), {}, "other pooling"),
    "layers after the mean": (timm_model("mobilenetv3_small_100"), {}, "layers in between"),
    "one position": (
        lambda: Head(lambda x: x, *pooled(nn.Linear(6, 5))),
        {"target_layer": "layers.1"},
        "no local features of 6",
    ),
    "unknown name": (timm_model("resnet18"), {"target_layer": "layer5"}, "layer5: no layer"),
    "foreign module": (
        timm_model("resnet18"), {"classifier": nn.Linear(512, 5)}, "classifier=Linear: no layer"
    ),
    "no linear layer": (
        timm_model("resnet18"), {"classifier": "layer4"}, "layer4: a Sequential; pass the nn.Linear"
    ),
    "other channels": (
        timm_model("resnet18"), {"target_layer": "layer3"}, "no local features of 512 channels"
    ),
    "pictures that do not fit": (
        timm_model("deit_tiny_patch16_224"), {}, r"does not run on .*64, 64.*pass example="
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(name: str) -> None:
    build, arguments, reason = REFUSED[name]
    torch.manual_seed(0)
    model = build()
    with pytest.raises(InputError, match=reason) as caught:
        find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE), **arguments)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_classifier_on_nothing_is_refused() -> None:
    model = Head(lambda x: x, nn.ReLU(), *pooled(nn.Linear(6, 5)))
    nn.init.constant_(model.body.bias, -100)
    with pytest.raises(InputError, match="all zero; pass example=, real pictures"):
        find_feature_layers(model, torch.randn(2, 3, 16, 16))


def test_an_unexpected_number_of_tokens_is_named() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 8, 8)
            self.norm = nn.LayerNorm(6)
            self.fc = nn.Linear(6, 5)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.norm(self.patches(images).flatten(2).transpose(1, 2))
            return self.fc(tokens.mean(1))

    torch.manual_seed(0)
    model = Tokens().eval()
    found = find_feature_layers(model, torch.randn(2, 3, 32, 32))
    assert (found.patch, found.prefix) == (8, 0)
    with pytest.raises(InputError, match=r"norm: 16 tokens .* expected 0 \+ 5 x 5"):
        found.features(model, torch.randn(1, 3, 36, 36))


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(fails: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[0].eval()
    before = [module.training for module in model.modules()]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
