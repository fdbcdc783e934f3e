import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from lpcam.errors import InputError
from lpcam.prototypes.kmeans import spherical_kmeans
from tests.oracles import kmeans as oracle


def positive_rows(seed: int, count: int = 150, channels: int = 8) -> np.ndarray:
    """Non-negative rows of very different lengths, as features after a ReLU are."""
    rng = np.random.default_rng(seed)
    return (rng.gamma(0.5, size=(count, channels)) * rng.gamma(1, size=(count, 1)) * 5).astype(
        np.float32
    )


def bundles(seed: int, size: int = 40) -> tuple[Tensor, np.ndarray]:
    """Rows scattered by about a degree around four orthogonal directions, lengths 1 to 10."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(4), size)
    rows = np.eye(6)[truth] + rng.normal(scale=0.02, size=(len(truth), 6))
    rows *= rng.uniform(1, 10, size=(len(truth), 1))
    return torch.from_numpy(rows.astype(np.float32)), truth


@pytest.mark.parametrize("tol", [1e-8, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_same_clusters_as_the_slow_loop(seed: int, tol: float) -> None:
    rows = positive_rows(seed)
    init = rows[np.random.default_rng(seed).choice(len(rows), 5, replace=False)]
    centres, labels, iterations = oracle.cosine_kmeans(rows, init, tol, 100)

    result = spherical_kmeans(
        torch.from_numpy(rows), 5, init=torch.from_numpy(init), max_iter=100, tol=tol
    )

    np.testing.assert_array_equal(result.labels.numpy(), labels)
    np.testing.assert_allclose(result.centers.numpy(), centres, rtol=1e-5, atol=1e-5)
    assert result.n_iter == iterations
    assert result.converged


@pytest.mark.parametrize("k", [3, 12])
def test_rows_that_are_not_read_again_would_stay(k: int) -> None:
    rows = positive_rows(k, count=600, channels=5)
    init = rows[:k]
    centres, labels, iterations = oracle.cosine_kmeans(rows, init, 1e-8, 200)
    assert iterations > 7  # the last ones read few rows

    result = spherical_kmeans(
        torch.from_numpy(rows), k, init=torch.from_numpy(init), max_iter=200, tol=1e-8
    )

    np.testing.assert_array_equal(result.labels.numpy(), labels)
    np.testing.assert_allclose(result.centers.numpy(), centres, rtol=1e-5, atol=1e-5)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 8.0]])
    init = torch.tensor([[10.0, 1.0], [0.1, 1.0]])

    result = spherical_kmeans(x, 2, init=init, tol=1e-6)

    # The means of the rows as they are, not of their directions: lengths count.
    torch.testing.assert_close(result.centers, torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    assert result.labels.tolist() == [0, 0, 1, 1]
    assert result.labels.dtype == torch.int64
    assert result.n_iter == 2
    assert result.converged


def test_without_an_iteration_there_is_no_result() -> None:
    with pytest.raises(InputError, match=r"^prototypes\.max_iter=0: give a number above 0$"):
        spherical_kmeans(torch.eye(3), 2, max_iter=0)


def test_stops_by_the_square_of_the_summed_movement() -> None:
    x = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    init = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # both centres move by 3: (3 + 3)^2 = 36
    assert spherical_kmeans(x, 2, init=init, tol=36.001).n_iter == 1
    assert spherical_kmeans(x, 2, init=init, tol=36).n_iter == 2
    cut = spherical_kmeans(x, 2, init=init, tol=36, max_iter=1)
    assert (cut.n_iter, cut.converged) == (1, False)


@pytest.mark.parametrize("seed", range(3))
def test_objective_never_decreases(seed: int) -> None:
    rows = positive_rows(seed, count=300)
    x = torch.from_numpy(rows)
    values = []
    for iterations in range(1, 15):
        result = spherical_kmeans(x, 6, init=x[:6], max_iter=iterations, tol=0)
        values.append(oracle.objective(rows, result.centers.numpy(), result.labels.numpy()))
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(values))
    assert values[-1] > values[0] * 1.001


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(6, 40), st.sampled_from([0.0, 0.4])
)
def test_centres_are_the_means_of_their_rows(
    seed: int, k: int, count: int, zero_share: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 4)).astype(np.float32)
    rows[rng.random(count) < zero_share] = 0
    rows[:6] = rng.normal(size=(6, 4))
    nonzero = rows.any(1)

    result = spherical_kmeans(torch.from_numpy(rows), k, seed=seed % 1000)

    labels, centres = result.labels.numpy(), result.centers.numpy()
    np.testing.assert_array_equal(labels == -1, ~nonzero)
    assert np.isfinite(centres).all()
    if result.converged:
        for cluster in range(k):
            members = rows[labels == cluster]
            if len(members):
                np.testing.assert_allclose(centres[cluster], members.mean(0), atol=1e-5)


def test_zero_rows_change_nothing() -> None:
    x = torch.from_numpy(positive_rows(0))
    padded = torch.cat([torch.zeros(3, x.shape[1]), x, torch.zeros(50, x.shape[1])])

    plain = spherical_kmeans(x, 5, init=x[:5], tol=1e-6)
    result = spherical_kmeans(padded, 5, init=x[:5], tol=1e-6)

    torch.testing.assert_close(result.centers, plain.centers)
    assert result.labels.tolist() == [-1] * 3 + plain.labels.tolist() + [-1] * 50


def test_one_cluster_is_the_mean_of_the_rows_that_are_not_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    result = spherical_kmeans(x, 1)
    torch.testing.assert_close(result.centers, torch.tensor([[0.5, 2.5]]))
    assert result.labels.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_as_many_clusters_as_rows(seed: int) -> None:
    x = torch.from_numpy(positive_rows(seed, count=7))
    result = spherical_kmeans(x, 7, seed=seed)
    assert sorted(result.labels.tolist()) == list(range(7))
    torch.testing.assert_close(result.centers[result.labels], x)


@pytest.mark.parametrize("init", [None, torch.ones(3, 4)])
def test_identical_rows_end_with_finite_centres(init: Tensor | None) -> None:
    x = torch.full((20, 4), 2.0)
    result = spherical_kmeans(x, 3, init=init)
    torch.testing.assert_close(result.centers, x[:3])
    assert set(result.labels.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("zeros", [0, 4])
def test_an_empty_cluster_gets_rows(zeros: int) -> None:
    x, _ = bundles(0)
    x = torch.cat([torch.zeros(zeros, 6), x])
    far = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.0, -1.0]])
    init = torch.cat([x[torch.tensor([0, 40, 80, 120]) + zeros], far])
    result = spherical_kmeans(x, 5, init=init, tol=1e-9)
    assert set(result.labels[zeros:].tolist()) == {0, 1, 2, 3, 4}
    assert result.converged


def test_an_empty_cluster_restarts_at_the_worst_row() -> None:
    x = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 1.0]])
    result = spherical_kmeans(x, 2, init=torch.tensor([[1.0, 0.1], [-1.0, 0.0]]))
    assert result.labels.tolist() == [0] * 9 + [1]


@pytest.mark.parametrize("seed", range(10))
def test_starts_in_every_direction_when_there_are_as_many_as_clusters(seed: int) -> None:
    truth = np.repeat(np.arange(5), [1, 200, 3, 50, 10])
    x = torch.eye(5)[torch.from_numpy(truth)] * (1 + torch.arange(len(truth))[:, None] % 7)
    result = spherical_kmeans(x, 5, seed=seed, max_iter=1)
    assert adjusted_rand_score(truth, result.labels) == 1


@pytest.mark.parametrize("zeros", [0, 4])
def test_more_clusters_than_rows(zeros: int) -> None:
    x = torch.cat([torch.rand(13, 4) + 0.1, torch.zeros(zeros, 4)])
    with pytest.raises(InputError) as caught:
        spherical_kmeans(x, 17)
    assert {"17", "13"} <= set(re.findall(r"\d+", str(caught.value)))


def test_same_seed_same_result() -> None:
    x = torch.from_numpy(positive_rows(1))
    torch.manual_seed(0)
    first = spherical_kmeans(x, 6, seed=3)
    torch.manual_seed(1)
    second = spherical_kmeans(x, 6, seed=3)
    assert torch.equal(first.centers, second.centers)
    assert torch.equal(first.labels, second.labels)
    others = [spherical_kmeans(x, 6, seed=seed) for seed in range(4, 8)]
    assert any(not torch.equal(first.labels, other.labels) for other in others)


@pytest.mark.parametrize("chunk_size", [1, 7, 150, 1000])
def test_chunks_change_nothing(chunk_size: int) -> None:
    x = torch.from_numpy(positive_rows(2))
    whole = spherical_kmeans(x, 5, seed=0, tol=1e-6)
    result = spherical_kmeans(x, 5, seed=0, tol=1e-6, chunk_size=chunk_size)
    assert torch.equal(result.labels, whole.labels)
    torch.testing.assert_close(result.centers, whole.centers)
    assert result.n_iter == whole.n_iter


def test_half_precision_rows_are_summed_without_overflow() -> None:
    rows = positive_rows(3, count=400) + 1
    rows[:, 0] += 400  # 400 rows x 400 is beyond float16
    half = torch.from_numpy(rows).half()
    centres, labels, _ = oracle.cosine_kmeans(half.numpy(), half[:3].numpy(), 1e-6, 100)

    result = spherical_kmeans(half, 3, init=half[:3], tol=1e-6)

    np.testing.assert_array_equal(result.labels.numpy(), labels)
    np.testing.assert_allclose(result.centers.float().numpy(), centres, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_finds_separated_directions_as_scikit_learn_does(seed: int) -> None:
    x, truth = bundles(seed)
    init = x[[0, 40, 80, 120]]

    result = spherical_kmeans(x, 4, init=init)

    unit = torch.nn.functional.normalize(x).numpy()
    peer = KMeans(4, init=torch.nn.functional.normalize(init).numpy(), n_init=1).fit(unit)
    assert adjusted_rand_score(truth, result.labels) == 1
    assert adjusted_rand_score(peer.labels_, result.labels) == 1
