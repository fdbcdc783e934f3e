"""Features of both signs: what is done to them before clustering and before maps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lpcam.prototypes.centers import Centers, Clustering, fit_centers
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, lpcam_setting
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.prototypes.selection import Selection, select
from tests.oracles.activation import cosine

CLASSES, DIM = 2, 5
LABELS = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
SHIFT = np.array([8, -3, 2, 0, 4], np.float32)


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [(rng.normal(size=(4, 6, DIM)) + SHIFT).astype(np.float32) for _ in range(4)]


def fitted(
    signed: str, found: Sequence[np.ndarray], chosen: Sequence[Sequence[int]] | None = None
) -> Centers:
    def split(index: int, class_index: int) -> np.ndarray:
        return np.random.default_rng([index, class_index]).random((4, 6), np.float32)

    return fit_centers(
        lambda index: found[index].astype(np.float16),
        LABELS,
        LinearHead(torch.zeros(CLASSES, DIM)),
        ["a", "b"],
        Clustering(k=2, activation=0.5, signed=signed),
        dim=DIM,
        read_map=split,
        chosen=chosen,
    )


def test_centred_features_cluster_as_features_without_their_mean() -> None:
    found = pictures()
    mean = np.mean([f.astype(np.float16).mean((0, 1), dtype=np.float64) for f in found[:3]], 0)
    centred = fitted("center", found)
    assert centred.mean is not None
    np.testing.assert_allclose(centred.mean, mean, rtol=1e-6)
    plain = fitted("keep", [f.astype(np.float16) - mean.astype(np.float32) for f in found])
    assert plain.mean is None
    torch.testing.assert_close(centred.centers, plain.centers, rtol=0, atol=2e-3)
    assert torch.equal(centred.counts, plain.counts)
    rectified = fitted("relu", found)
    expected = fitted("keep", [f.clip(0) for f in found])
    torch.testing.assert_close(rectified.centers, expected.centers)


def test_the_mean_is_that_of_the_pictures_that_are_clustered() -> None:
    found = pictures()
    centred = fitted("center", found, [[0], [1]])
    mean = np.mean([f.astype(np.float16).mean((0, 1), dtype=np.float64) for f in found[:2]], 0)
    assert centred.mean is not None
    np.testing.assert_allclose(centred.mean, mean, rtol=1e-6)


@pytest.mark.parametrize("signed", ["keep", "relu", "center"])
def test_prototypes_say_what_is_done(tmp_path: Path, signed: str) -> None:
    fitted(signed, pictures()).save(tmp_path / "centers.safetensors")
    centers = Centers.load(tmp_path / "centers.safetensors")
    head = LinearHead(torch.zeros(CLASSES, DIM))
    select(centers, head, ["a", "b"], Selection(0, 1)).save(tmp_path / "prototypes.safetensors")
    prototypes = Prototypes.load(tmp_path / "prototypes.safetensors")
    assert prototypes.settings["signed"] == signed
    assert (prototypes.mean is None) == (signed != "center")
    setting = lpcam_setting(prototypes, "both")
    assert setting.signed == signed
    assert setting.mean is prototypes.mean


@pytest.mark.parametrize("rounded", [False, True])
def test_maps_of_settings_that_do_different_things_from_one_pass(*, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 1, DIM, 4, 6, generator=generator) + torch.from_numpy(
        SHIFT[:, None, None]
    )
    directions = torch.randn(5, CLASSES, DIM, generator=generator)
    means: list[Tensor | None] = [None, torch.from_numpy(SHIFT), None, torch.ones(DIM), None]
    kinds = ["keep", "center", "relu", "center", "keep"]
    settings = [
        MapSetting(d, 0.5, signed=kind, mean=mean)
        for d, kind, mean in zip(directions, kinds, means, strict=True)
    ]
    labels = torch.tensor([[True, True]])
    size = (16, 24)  # the stride-4 grid is that of the features

    made = MapMaker(settings, rounded=rounded)([HostViews(features)], labels, size)

    mean_views = features[:, 0].mean(0).numpy()
    for found, setting in zip(made, settings, strict=True):
        assert setting.directions is not None
        for c in range(CLASSES):
            expected = np.zeros((4, 6))
            direction = setting.directions[c].double().numpy()
            for y, x in np.ndindex(4, 6):
                feature = mean_views[:, y, x]
                if setting.mean is not None:
                    feature = feature - setting.mean.numpy()
                if setting.signed == "relu":
                    feature = feature.clip(0)
                # The directions are no unit vectors: the product is with the unit feature.
                value = cosine(feature, direction) * np.linalg.norm(direction) + 0.5
                expected[y, x] = max(value, 0)
            expected /= expected.max() + 1e-5
            np.testing.assert_allclose(found[c], expected, rtol=0, atol=5e-3 if rounded else 1e-5)
    (alone,) = MapMaker(settings[1:2], rounded=rounded)([HostViews(features)], labels, size)
    assert torch.equal(alone, made[1])
