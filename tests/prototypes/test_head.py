import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpcam.errors import InputError
from lpcam.prototypes.head import AGGREGATES, PrototypeHead
from lpcam.prototypes.prototype_set import Prototypes
from tests.oracles.activation import cosine
from tests.oracles.aggregation import aggregated_map

CHANNELS = 6
# Class and context prototypes of each class; the third is not fitted.
COUNTS = ((5, 2), (1, 0), (0, 3), (2, 4))


def fitted(seed: int = 0, signed: str = "keep", mean: torch.Tensor | None = None) -> Prototypes:
    generator = torch.Generator().manual_seed(seed)
    foreground, context = (
        tuple(torch.randn(counts[s], CHANNELS, generator=generator) * 9 for counts in COUNTS)
        for s in (0, 1)
    )
    indices = tuple((list(range(p)), list(range(q))) for p, q in COUNTS)
    settings = {"signed": signed}
    return Prototypes(tuple("abcd"), foreground, context, indices, settings=settings, mean=mean)


def features(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(seed)) * 5


def expected(prototypes: Prototypes, local: torch.Tensor, how: str) -> np.ndarray:
    return aggregated_map(
        local.numpy(),
        [vectors.numpy() for vectors in prototypes.foreground],
        [vectors.numpy() for vectors in prototypes.context],
        how,
    )


@pytest.mark.parametrize("how", AGGREGATES)
def test_maps_are_those_of_one_prototype_at_a_time(how: str) -> None:
    prototypes, local = fitted(), features()

    maps = PrototypeHead(prototypes).maps(local, aggregate=how).numpy()

    np.testing.assert_allclose(maps, expected(prototypes, local, how), rtol=0, atol=2e-6)
    assert (maps[:, [0, 1, 3]] > 0).any((0, 2, 3)).all()
    assert not maps[:, 2].any()


@pytest.mark.parametrize("how", AGGREGATES)
def test_chosen_classes_have_the_maps_they_have_among_all(how: str) -> None:
    head, local = PrototypeHead(fitted()), features()

    some = head.maps(local, torch.tensor([3, 0]), how)

    torch.testing.assert_close(some, head.maps(local, aggregate=how)[:, [3, 0]])


@pytest.mark.parametrize("how", AGGREGATES)
def test_a_zero_feature_has_no_activation(how: str) -> None:
    assert not PrototypeHead(fitted()).maps(torch.zeros(1, CHANNELS, 2, 2), aggregate=how).any()


@given(st.integers(0, 2**32 - 1))
def test_log_sum_exp_lies_between_mean_and_maximum(seed: int) -> None:
    prototypes = fitted(seed)
    prototypes = Prototypes(
        ("a",), (prototypes.foreground[0],), (prototypes.context[1],), (([0, 1, 2, 3, 4], []),)
    )
    head, local = PrototypeHead(prototypes), features(seed)

    mean, lse, largest = (head.maps(local, aggregate=how) for how in ("mean", "lse", "max"))

    assert (mean <= lse + 1e-6).all()
    assert (lse <= largest + 1e-6).all()


@pytest.mark.parametrize("signed", ["relu", "center"])
def test_features_are_transformed_before_they_are_compared(signed: str) -> None:
    mean = torch.arange(float(CHANNELS)) if signed == "center" else None
    prototypes, local = fitted(signed=signed, mean=mean), features()

    maps = PrototypeHead(prototypes).maps(local).numpy()

    changed = local.clamp_min(0) if mean is None else local - mean[None, :, None, None]
    np.testing.assert_allclose(maps, expected(prototypes, changed, "mean"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", ["class", "context"])
def test_similarity_is_the_cosine_to_each_prototype(side: str) -> None:
    prototypes, local = fitted(), features()

    found = PrototypeHead(prototypes).similarity(local, "d", side).numpy()

    vectors = prototypes.vectors("d", side).numpy()
    for b, p, y, x in np.ndindex(found.shape):
        exact = cosine(local[b, :, y, x].numpy(), vectors[p])
        assert found[b, p, y, x] == pytest.approx(exact, abs=1e-6)
    assert found.shape == (2, len(vectors), 3, 4)


def test_an_unknown_aggregate_is_named() -> None:
    with pytest.raises(InputError, match=r"aggregate=median: unknown; choose mean, max, topk, lse"):
        PrototypeHead(fitted()).maps(features(), aggregate="median")
