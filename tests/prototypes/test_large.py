"""k-means++ among more rows than torch.multinomial draws from."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lpcam.prototypes import kmeans
from lpcam.prototypes.kmeans import spherical_kmeans


def drawn(mass: torch.Tensor, count: int) -> np.ndarray:
    """How often each row comes in so many draws."""
    generator = torch.Generator().manual_seed(0)
    return np.bincount([kmeans._draw(mass, generator) for _ in range(count)], minlength=len(mass))


# Blocks of 4 of 18 rows, which are more blocks than 4: they are drawn in blocks too.
@pytest.mark.parametrize("limit", [4, 7, 17, 18])
def test_rows_are_drawn_by_their_mass(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    mass = torch.tensor([0, 0, 0, 0, 5, 0, 1, 2, 0, 8, 1, 0, 0, 0, 3, 1, 4, 0], dtype=torch.float64)
    monkeypatch.setattr(kmeans, "DRAWN", limit)

    found = drawn(mass, 10_000)

    there = mass.numpy() > 0
    assert not found[~there].any()
    expected = mass.numpy() / float(mass.sum()) * found.sum()
    assert chisquare(found[there], expected[there]).pvalue > 0.01


def test_the_check_would_notice_rows_drawn_block_by_block_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mass = torch.arange(1, 19, dtype=torch.float64)
    alike = torch.cat([rows / rows.sum() for rows in mass.split(4)])
    monkeypatch.setattr(kmeans, "DRAWN", 4)
    found = drawn(alike, 10_000)
    assert chisquare(found, mass.numpy() / 171 * found.sum()).pvalue < 1e-6


@pytest.mark.parametrize("rows", [1, 100])
def test_within_the_limit_it_is_the_plain_draw(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    mass = torch.rand(rows, dtype=torch.float64)
    monkeypatch.setattr(kmeans, "DRAWN", rows)
    plain = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        wanted = int(torch.multinomial(mass, 1, generator=plain))
        assert kmeans._draw(mass, generator) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_clusters_start_in_every_direction(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(kmeans, "DRAWN", 8)
    truth = torch.tensor([0] * 100 + [1] * 3 + [2] * 50 + [3])
    x = torch.eye(4)[truth] * (1 + torch.arange(len(truth))[:, None] % 7)
    x = torch.cat([x, torch.zeros(20, 4)])
    result = spherical_kmeans(x, 4, seed=seed, max_iter=1)
    assert sorted(result.labels[[0, 100, 103, 153]].tolist()) == [0, 1, 2, 3]
    assert result.labels[-20:].tolist() == [-1] * 20


@pytest.mark.slow
def test_more_rows_than_torch_draws_from() -> None:
    count = 2**24 + 4096
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.ones(1).expand(count), 1)
    x = torch.zeros(count, 2, dtype=torch.float16)
    x[:-4096, 0] = x[-4096:, 1] = 1  # the other direction lies beyond the limit

    result = spherical_kmeans(x, 2, max_iter=1, chunk_size=2**16)

    assert sorted(result.centers.tolist()) == [[0, 1], [1, 0]]
    assert len(set(result.labels[-4097:].tolist())) == 2
