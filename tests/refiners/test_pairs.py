import numpy as np
import pytest
import torch

from lpcam.refiners.irn.training import displacement_loss
from lpcam.refiners.pairs import affinity_loss, mean_where, pair_labels
from lpcam.refiners.random_walk import pair_offsets
from tests.oracles import pairs as oracle


def some_labels(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Labels of which the highest, 80 and 254, would be lost if the number of classes was bound."""
    return np.random.default_rng(seed).choice([0, 0, 1, 80, 254, 255], shape)


@pytest.mark.parametrize(("shape", "radius"), [((2, 7, 9), 3), ((1, 5, 9), 5), ((1, 4, 3), 2)])
def test_pair_labels(shape: tuple[int, int, int], radius: int) -> None:
    labels = some_labels(shape)
    found = pair_labels(torch.from_numpy(labels), radius)
    offsets = pair_offsets(radius)
    margin = radius - 1
    sources = (shape[1] - margin, shape[2] - 2 * margin)
    assert found.different.shape == (shape[0], len(offsets), *sources)
    sets: dict[str, set[oracle.Pair]] = {name: set() for name in found._fields}
    for name, mask in zip(found._fields, found, strict=True):
        for b, o, y, x in mask.nonzero().tolist():
            sets[name].add((b, y, x + margin, *offsets[o]))
    expected: dict[str, set[oracle.Pair]] = {name: set() for name in sets}
    for pair in oracle.pairs(shape, radius):
        if known := oracle.kind(labels, pair):
            expected[known].add(pair)
    assert sets == expected
    assert any(expected.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_affinity_loss(seed: int) -> None:
    radius, shape = 3, (2, 6, 8)
    labels = some_labels(shape, seed)
    rng = np.random.default_rng(seed)
    offsets = pair_offsets(radius)
    affinity = rng.random((2, len(offsets), 4, 4))
    affinity[0, 0, 0] = (0, 0, 1, 1)
    values = {
        (b, y, x, *offset): float(affinity[b, offsets.index(offset), y, x - radius + 1])
        for b, y, x, *step in oracle.pairs(shape, radius)
        for offset in [(step[0], step[1])]
    }
    found = affinity_loss(torch.from_numpy(affinity), pair_labels(torch.from_numpy(labels), radius))
    assert float(found) == pytest.approx(oracle.affinity_loss(values, labels), rel=1e-10)


def test_displacement_loss() -> None:
    radius, shape = 3, (2, 6, 8)
    labels = some_labels(shape)
    displacement = np.random.default_rng(2).normal(size=(2, 2, 6, 8))
    found = displacement_loss(
        torch.from_numpy(displacement), pair_labels(torch.from_numpy(labels), radius), radius
    )
    expected = oracle.displacement_loss(displacement, labels, radius)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_displacements_to_one_point_cost_nothing() -> None:
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    towards = torch.stack([4 - rows, 7 - columns])[None]
    pairs = pair_labels(torch.full((1, 9, 9), 80), 3)
    assert float(displacement_loss(towards, pairs, 3)) == 0


@pytest.mark.parametrize("label", [0, 5, 255])
def test_a_picture_of_one_label(label: int) -> None:
    pairs = pair_labels(torch.full((1, 7, 9), label), 3)
    affinity = torch.full((1, len(pair_offsets(3)), 5, 5), 0.5, requires_grad=True)
    loss = affinity_loss(affinity, pairs)
    loss.backward()
    expected = 0.0 if label == 255 else -np.log(0.5 + 1e-5) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert affinity.grad is not None
    assert affinity.grad.isfinite().all()


def test_mean_of_nothing() -> None:
    assert float(mean_where(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == 0
