"""The loss of labels against its oracle, and DeepLabV2's sum over scales."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.segmentation.loss import label_loss, pyramid_loss
from tests.oracles.dilated_head import cross_entropy


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(0, 2, (2, 4, 5, 6)))
    labels = torch.from_numpy(rng.choice([0, 0, 1, 2, 3, 255], (2, 5, 6)))
    return scores, labels, torch.from_numpy(rng.uniform(0, 1, (2, 5, 6)))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_mean_of_what_is_known(balanced: bool, weighted: bool) -> None:
    for seed in range(3):
        scores, labels, weights = case(seed)
        expected = cross_entropy(
            scores.numpy(),
            labels.numpy(),
            weights.numpy() if weighted else np.ones(labels.shape),
            balanced=balanced,
        )
        found = label_loss(scores, labels, weights if weighted else None, balanced=balanced)
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("label", [0, 2])
def test_one_side_alone_and_nothing_at_all(balanced: bool, label: int) -> None:
    scores, labels, _ = case(4)
    one = torch.full_like(labels, label)
    expected = F.cross_entropy(scores, one)
    assert float(label_loss(scores, one, balanced=balanced)) == pytest.approx(float(expected))
    scores.requires_grad_()
    nothing = label_loss(scores, torch.full_like(labels, 255), balanced=balanced)
    nothing.backward()
    assert float(nothing) == 0
    assert not scores.grad.any()


def test_labels_come_to_the_networks_grid_or_scores_to_the_pictures() -> None:
    scores = torch.zeros(1, 2, 2, 2)
    scores[0, 1] = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    labels[0, 1, 1] = labels[0, 4, 4] = 1  # what lies under the middle of each cell
    assert float(label_loss(scores, labels, grid="network")) < 1e-3
    assert float(label_loss(scores, labels, grid="picture")) > 0.5
    labels[0, :3, :3] = labels[0, 3:, 3:] = 1
    brought = F.interpolate(scores, (6, 6), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(brought, labels)
    assert float(label_loss(scores, labels)) == pytest.approx(float(expected), rel=1e-6)


class Pooling(nn.Module):
    """Scores that are means over blocks of 8x8 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8)


def test_the_pyramid_adds_smaller_pictures_and_the_maximum_of_all() -> None:
    torch.manual_seed(5)
    images, labels = torch.randn(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))
    common = {"grid": "network", "balanced": False}
    network = Pooling()

    def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(values, size, mode="bilinear", align_corners=False)

    first = network(images)
    others = [network(resized(images, size)) for size in ((16, 24), (24, 36))]
    highest = torch.stack([first, *(resized(o, (4, 6)) for o in others)]).amax(0)
    expected = sum(
        float(label_loss(scores, labels, grid="network")) for scores in (first, *others, highest)
    )
    found = pyramid_loss(network, images, labels, None, scales=(0.5, 0.75), **common)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    alone = pyramid_loss(network, images, labels, None, scales=(), **common)
    assert float(alone) == pytest.approx(float(label_loss(first, labels, grid="network")))
