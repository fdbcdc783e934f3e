"""Transformers that classify by a class token: the patch tokens beside it are taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lpcam import LPCAM
from lpcam.__main__ import main
from lpcam.errors import InputError
from lpcam.explain.feature_layers import FeatureLayers, find_feature_layers
from lpcam.explain.views import PAPER_VIEWS

SIDE, CLASSES = 64, 5
WARNING = (
    "target_layer=norm: the classifier head reads the class token beside its patch tokens; "
    "maps are an approximation"
)


def vit(**options: Any) -> nn.Module:
    """A small ViT of timm's with random weights."""
    torch.manual_seed(0)
    return VisionTransformer(
        **{"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        | {"num_classes": CLASSES}
        | options
    ).eval()


def batch(height: int = SIDE, width: int = SIDE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.eye(CLASSES)[[0, 1, 2]]
    return torch.randn(3, 3, height, width, generator=generator), labels


def found_in(model: nn.Module, **arguments: Any) -> FeatureLayers:
    return find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE), **arguments)


def test_timms_deit_needs_no_argument() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        cam = LPCAM(model, k=2, class_score=0.0)
    maps = cam.fit([batch(224, 224)], progress=False)(batch(224, 224)[0])

    # Said once, about the line that asked for it.
    assert [(str(said.message), said.filename) for said in caught] == [(WARNING, __file__)]
    assert cam.head.fitted == [0, 1, 2]
    assert maps.shape == (3, CLASSES, 224, 224)
    assert ((maps >= 0) & (maps <= 1)).all()
    assert maps[:, :3].any()


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_tokens_of_patches_are_taken_and_no_others(registers: int) -> None:
    model = vit(reg_tokens=registers, dynamic_img_size=True)
    with pytest.warns(UserWarning, match=WARNING):
        found = found_in(model)
    images, _ = batch(48, 96)

    with torch.no_grad():
        features = found.features(model, images)
        tokens = model.forward_features(images)

    assert (found.name, found.prefix) == ("norm", 1 + registers)
    assert features.shape == (3, 32, 3, 6)
    torch.testing.assert_close(features.flatten(2).mT, tokens[:, 1 + registers :])
    # The class token decides, so the mean of the positions' scores is not the model's.
    scores = torch.einsum("bdhw,cd->bc", features, found.weight) / 18 + model.head.bias
    assert (scores - model(images)).abs().max() > 0.1 * model(images).abs().max()


def test_an_average_of_all_tokens_but_the_class_token_needs_no_warning() -> None:
    assert found_in(vit(global_pool="avg", class_token=True)).prefix == 1  # a warning is an error


def test_torchvisions_class() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(SIDE, 16, 2, 2, 32, 64, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zero at first
    with pytest.warns(UserWarning, match="classifier heads.head reads the class token"):
        found = found_in(model)
    assert (found.name, found.patch, found.prefix) == ("encoder", 16, 1)


def test_naming_the_layer_is_the_same() -> None:
    model = vit()
    with pytest.warns(UserWarning, match=WARNING) as caught:
        assert found_in(model) == found_in(model, target_layer="norm")
    assert [str(said.message) for said in caught] == [WARNING] * 2


def test_half_precision() -> None:
    model = vit().bfloat16()
    with pytest.warns(UserWarning, match=WARNING):
        found = find_feature_layers(model, torch.randn(2, 3, SIDE, SIDE).bfloat16())
    assert found.name == "norm"


def test_two_heads_are_refused_and_one_can_be_chosen() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=SIDE
    ).eval()
    with pytest.raises(InputError) as refused:
        found_in(model)
    assert str(refused.value) == (
        "classifier: the model's output is the mean of those of head and head_dist, and LPCAM "
        "reads one; pass classifier='head' to map with that one alone"
    )
    with pytest.warns(UserWarning, match=WARNING):
        found = found_in(model, classifier="head")
    assert (found.name, found.prefix) == ("norm", 2)


class FirstPatch(nn.Module):
    """Scores the first patch; there is no other token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 16, 16)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patches(images).flatten(2).mT)
        return self.fc(tokens[:, 0])


def test_a_patch_that_comes_first_is_no_class_token() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="no layer's mean over positions is its input"):
        found_in(FirstPatch())


def test_a_norm_of_the_class_token_alone_leaves_nothing_to_map() -> None:
    torch.manual_seed(0)
    model = timm.create_model("pit_ti_224", num_classes=CLASSES)
    with pytest.raises(InputError, match="layers in between") as caught:
        find_feature_layers(model, torch.randn(2, 3, 224, 224))
    assert "\n" not in str(caught.value)


def test_fit_save_and_load_at_several_sizes(tmp_path: Path) -> None:
    model = vit(reg_tokens=2, dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.warns(UserWarning, match=WARNING):
        cam = LPCAM(model, k=2, class_score=0.0, example=(3, SIDE, SIDE))
    cam.fit([batch(), batch(48, 80)], progress=False).save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=WARNING) as caught:
        loaded = LPCAM.load(tmp_path / "a.safetensors", model)
    assert [str(said.message) for said in caught] == [WARNING]

    images, labels = batch(70, 101)  # padded to 80 x 112 by the model
    maps, plain = cam.compare(images, labels, views=PAPER_VIEWS)
    assert maps.shape == plain.shape == (3, CLASSES, 70, 101)
    assert maps[labels.bool()].any()
    assert torch.equal(loaded(images, labels, views=PAPER_VIEWS), maps)
    assert cam.similarity(images, 0).shape[2:] == (70, 101)
    assert torch.equal(loaded.similarity(images, 0), cam.similarity(images, 0))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES)
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    with pytest.warns(UserWarning, match=WARNING):
        cam = LPCAM(model, k=1, class_score=0.0, classes=list("abcde"))
    cam.fit([batch(224, 224)], progress=False).save(tmp_path / "a.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (150, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")

    with pytest.warns(UserWarning, match=WARNING) as caught:
        status = main(
            ["explain", str(tmp_path / "wide.png"), "--model=deit_tiny_patch16_224",
             f"--weights={tmp_path / 'deit.pth'}", f"--prototypes={tmp_path / 'a.safetensors'}",
             f"--output={tmp_path / 'out'}", "--classes", "b", "--multi-scale"]
        )  # fmt: skip

    assert status == 0, capsys.readouterr().err
    assert [str(said.message) for said in caught] == [WARNING]
    with Image.open(tmp_path / "out" / "wide-b.png") as shown:
        assert shown.size == (250, 150)
