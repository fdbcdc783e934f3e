"""The published implementation's numbers, see data_files/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpcam.functional import local_prototype_map, normalize_maps, prototype_directions
from lpcam.kmeans import spherical_kmeans
from lpcam.prototypes import select_prototypes
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
