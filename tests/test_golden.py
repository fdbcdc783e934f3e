"""The published implementation's numbers, see data_files/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lpcam.functional import local_prototype_map, normalize_maps, prototype_directions
from lpcam.programs.build import settings
from lpcam.prototypes.centers import Centers, Clustering
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.kmeans import spherical_kmeans
from lpcam.prototypes.local_features import split_features
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, lpcam_setting
from lpcam.prototypes.selection import Selection, select, select_prototypes
from lpcam.stages.maps import Inference
from tests.conftest import ROOT
from tests.oracles.interpolation import top_left
from tests.oracles.prototypes import class_probability, split

SCALES = 4


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data_files" / "official_lpcam.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def collected(published: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Foreground and context features of the three classes, by the reference implementation."""
    sides = []
    for class_index in range(3):
        pictures = np.flatnonzero(published["labels"][:, class_index])
        maps = []
        for picture in pictures:
            place = int(published["labels"][picture, :class_index].sum())
            maps.append(top_left(published[f"cam_high_res_{picture}"][place], (7, 9)))
        features = [published["single_features"][picture] for picture in pictures]
        sides += split(features, maps, float(published["tau"]))
    return sides


@pytest.mark.parametrize("run", range(6))
def test_kmeans(published: dict[str, np.ndarray], collected: list[np.ndarray], run: int) -> None:
    x = torch.from_numpy(collected[run])
    init = x[torch.from_numpy(published[f"kmeans{run}_init_index"])]

    result = spherical_kmeans(x, int(published["K"]), init=init, tol=1e-4)

    np.testing.assert_array_equal(result.labels.numpy(), published[f"kmeans{run}_labels"])
    np.testing.assert_allclose(result.centers.numpy(), published[f"kmeans{run}_centers"], atol=1e-5)
    assert result.converged


@pytest.mark.parametrize("class_index", range(3))
def test_selection(published: dict[str, np.ndarray], class_index: int) -> None:
    weight = published["weight"]
    mu_f, mu_b, floor = (float(published[name]) for name in ("mu_f", "mu_b", "context_floor"))
    for side, name, low, high in (
        (0, "class_prototypes", mu_f, None),
        (1, "context_prototypes", floor, mu_b),
    ):
        centres = published[f"kmeans{2 * class_index + side}_centers"]

        kept = select_prototypes(
            torch.from_numpy(centres),
            torch.from_numpy(weight),
            class_index,
            minimum=low,
            maximum=high,
        ).numpy()

        np.testing.assert_array_equal(centres[kept], published[f"{name}_{class_index}"])
        scores = np.array([class_probability(centre, weight, class_index) for centre in centres])
        np.testing.assert_array_equal(kept, (scores > low) & (scores < (high or np.inf)))


def test_maps(published: dict[str, np.ndarray]) -> None:
    keys = published["keys"]
    directions = prototype_directions(
        [torch.from_numpy(published[f"class_prototypes_{key}"]) for key in keys],
        [torch.from_numpy(published[f"context_prototypes_{key}"]) for key in keys],
    )
    size = published["lpcam_stride4"].shape[1:]
    total = torch.zeros(1, len(keys), *size)
    for scale in range(SCALES):
        picture, mirrored = torch.from_numpy(published[f"views_scale{scale}"])
        features = picture + mirrored.flip(-1)
        positive = local_prototype_map(features[None], directions).relu()
        total += F.interpolate(positive, size, mode="bilinear", align_corners=False)

    maps = normalize_maps(total[0] / SCALES, eps=0)

    np.testing.assert_allclose(maps.numpy(), published["lpcam_stride4"], rtol=0, atol=2e-6)


def test_recipe_code_end_to_end(
    published: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that infer.py calls with the settings of recipe=code, features to maps."""
    monkeypatch.setenv("LPCAM_PROJECT", str(ROOT))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("infer", ["recipe=code", "dataset=voc"])
    clustering = settings(Clustering, cfg.prototypes, cfg.thresholds)
    inference = settings(Inference, cfg.inference)
    assert clustering.split == "multi_scale"
    weight, labels = (torch.from_numpy(published[name]) for name in ("weight", "labels"))
    head = LinearHead(weight)
    k = int(published["K"])
    centers = torch.zeros(len(weight), 2, k, weight.shape[1])
    for class_index in range(3):

        def read_map(index: int, class_index: int = class_index) -> np.ndarray:
            place = int(labels[index, :class_index].sum())
            return top_left(published[f"cam_high_res_{index}"][place], (7, 9))

        sides = split_features(
            lambda index: published["single_features"][index].transpose(1, 2, 0),
            labels[:, class_index].nonzero()[:, 0].tolist(),
            head,
            class_index,
            float(published["tau"]),
            read_map=read_map,
            strict=clustering.split == "multi_scale",
        )
        for side, features in enumerate(sides):
            run = 2 * class_index + side
            init = features.rows[torch.from_numpy(published[f"kmeans{run}_init_index"])]
            found = spherical_kmeans(
                features.rows, k, init=init, tol=1e-4, max_iter=clustering.max_iter
            )
            np.testing.assert_array_equal(found.labels.numpy(), published[f"kmeans{run}_labels"])
            centers[class_index, side] = found.centers

    counts = centers.any(-1).long()
    chosen = select(
        Centers(centers, counts, torch.full((*counts.shape, 6, 3), -1, dtype=torch.int32)),
        head,
        [str(c) for c in range(len(weight))],
        Selection(
            class_score=float(published["mu_f"]),
            context_score=float(published["mu_b"]),
            context_floor=float(published["context_floor"]),
            fallback=cfg.prototypes.fallback,
        ),
    )
    for class_index in range(3):
        for name, kept in (("class", chosen.foreground), ("context", chosen.context)):
            expected = published[f"{name}_prototypes_{class_index}"]
            assert expected.shape == kept[class_index].shape
            np.testing.assert_allclose(kept[class_index].numpy(), expected, rtol=0, atol=1e-5)

    assert inference.flip
    assert len(inference.scales) == SCALES
    views = [torch.from_numpy(published[f"views_scale{scale}"]) for scale in range(SCALES)]
    features = [torch.stack([plain, mirrored.flip(-1)]) for plain, mirrored in views]
    scales = [HostViews(v[:, None], head.own_maps(v)[:, None]) for v in features]
    wanted = torch.zeros(1, len(weight), dtype=torch.bool)
    wanted[0, published["keys"]] = True
    maker = MapMaker([MapSetting(), lpcam_setting(chosen, cfg.prototypes.use)], eps=inference.eps)
    _, lpcam = maker(scales, wanted, (100, 140))
    np.testing.assert_allclose(lpcam.numpy(), published["lpcam_stride4"], rtol=0, atol=2e-6)
