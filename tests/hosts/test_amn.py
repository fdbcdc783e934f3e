"""AMN's maps of a picture: one for all scales and views, and its seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.hosts.amn import AMN
from lpcam.models.backbones import build_backbone
from lpcam.seeds.palette import save_mask
from tests.oracles import amn

LABELS = torch.tensor([[1.0, 0, 1]])


def make(folder: Path, **options: object) -> AMN:
    host = AMN(build_backbone("test_resnet", None), 3, dilations=[1, 2], **options).eval()
    for layer in host.head.branches:
        nn.init.normal_(layer.weight, std=0.2)
    seeds = np.zeros((64, 96), np.uint8)
    seeds[:32, 16:80] = 1
    seeds[32:48, :48] = 255
    save_mask(folder / "one.png", seeds)
    host.seeds = {"one": folder / "one.png"}
    return host


def batch(image_id: str = "one") -> ViewBatch:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(1, 3, *size, generator=generator) for size in ((64, 96), (32, 48))]
    return {"ids": [image_id], "labels": LABELS, "size": (64, 96), "views": views, "flip": True}


@torch.no_grad()
def test_scores_are_averaged_before_the_softmax(tmp_path: Path) -> None:
    host, given = make(tmp_path), batch()
    scores: list[Tensor] = []
    features = []
    for view in given["views"]:
        factor = (host.condition.weight @ LABELS[0] + host.condition.bias)[:, None, None]
        plain, mirrored = (host.backbone(x)[0] * factor for x in (view, view.flip(3)))
        features.append(torch.stack([plain, mirrored.flip(2)]))
        both = [host.head(plain[None]), host.head(mirrored[None]).flip(3)]
        scores += [F.interpolate(one, (4, 6), mode="bilinear") for one in both]
    mean = torch.stack(scores).mean(0)[0].numpy()
    inside = np.zeros((4, 6), bool)
    inside[:2, 1:5] = True
    inside[2, :3] = True

    fine, coarse = host.predict_step(given, 0)

    for found, expected in zip((fine, coarse), features, strict=True):
        torch.testing.assert_close(found.features[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert fine.maps is not None
    assert coarse.maps is not None
    assert not coarse.maps.any()
    assert coarse.maps.shape == (2, 1, 3, *coarse.features.shape[3:])
    assert torch.equal(fine.maps[0], fine.maps[1])
    shares = np.apply_along_axis(amn.softmax, 0, mean)[1:]
    for found, share in zip(fine.maps[0, 0], shares, strict=True):
        expected = amn.stretch(share, inside, 1e-5)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_picture_always_loses_the_same_features(tmp_path: Path) -> None:
    host = make(tmp_path, dropout=0.5, dropout_at_inference=True)
    whole = make(tmp_path)
    whole.load_state_dict(host.state_dict())
    first, again, plain = (h.predict_step(batch(), 0)[0] for h in (host, host, whole))
    assert first.maps is not None
    assert again.maps is not None
    assert plain.maps is not None
    assert torch.equal(first.maps, again.maps)
    assert not torch.allclose(first.maps, plain.maps, atol=1e-2)
    torch.testing.assert_close(first.features, plain.features)  # prototypes read them whole
    assert host.score_key != whole.score_key
    assert host.feature_key == whole.feature_key


def test_seeds_and_labels_decide_the_keys(tmp_path: Path) -> None:
    host = make(tmp_path)
    scores, features = host.score_key, host.feature_key
    host.seeds_key = "other"
    assert host.score_key != scores
    assert host.feature_key == features
    host.condition.bias.data += 1
    assert host.feature_key != features
    twin = host.for_inference()
    assert twin.seeds == host.seeds
    assert twin.score_key == host.score_key


def test_a_picture_from_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no seeds of picture cat") as caught:
        make(tmp_path).predict_step(batch("cat"), 0)
    assert "\n" not in str(caught.value)
