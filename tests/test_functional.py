import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lpcam.functional import (
    class_activation_map,
    local_prototype_map,
    normalize_maps,
    prototype_directions,
    resize,
)
from tests.oracles import activation

CHANNELS = 16
# Class prototypes and context prototypes of four classes; either side may have none.
COUNTS = ((3, 2), (1, 4), (5, 0), (0, 2))


def random_case(dtype: torch.dtype, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    features = draw(2, CHANNELS, 5, 7) * 10
    own = [draw(p, CHANNELS) * 30 for p, _ in COUNTS]
    context = [draw(q, CHANNELS) * 30 for _, q in COUNTS]
    return features, own, context


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_one_direction_equals_prototype_by_prototype(
    dtype: torch.dtype, atol: float, seed: int
) -> None:
    features, own, context = random_case(dtype, seed)

    maps = local_prototype_map(features, prototype_directions(own, context))

    expected = activation.local_prototype_map(
        features.numpy(), [p.numpy() for p in own], [p.numpy() for p in context]
    )
    assert maps.dtype == dtype
    np.testing.assert_allclose(maps.numpy(), expected, rtol=0, atol=atol)


def test_a_zero_feature_scores_zero_in_every_precision() -> None:
    features = torch.ones(1, 3, 1, 2)
    features[..., 0] = 0
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        maps = local_prototype_map(features.to(dtype), torch.ones(2, 3, dtype=dtype))
        assert not maps[..., 0].any()
        assert (maps[..., 1] > 1).all()


def test_local_prototype_map_by_hand() -> None:
    own = [torch.tensor([[7.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])]
    context = [torch.tensor([[0.0, 9.0]]), torch.empty(0, 2)]
    features = torch.tensor([[[[3.0]], [[4.0]]]])

    maps = local_prototype_map(features, prototype_directions(own, context))

    # (3, 4) has cosines 0.6 and 0.8 to the axes: 0.6 - 0.8, and (0.6 + 0.8) / 2.
    torch.testing.assert_close(maps.flatten(), torch.tensor([-0.2, 0.7]))


def test_directions_need_both_sides_of_every_class() -> None:
    with pytest.raises(ValueError, match="argument"):
        prototype_directions([torch.ones(1, 2), torch.ones(1, 2)], [torch.ones(1, 2)])


def test_zero_features_score_zero() -> None:
    _, own, context = random_case(torch.float32, 0)
    maps = local_prototype_map(torch.zeros(1, CHANNELS, 2, 2), prototype_directions(own, context))
    assert not maps.any()


def test_local_prototype_map_ignores_the_length_of_features() -> None:
    features, own, context = random_case(torch.float32, 0)
    directions = prototype_directions(own, context)
    torch.testing.assert_close(
        local_prototype_map(features * 37, directions), local_prototype_map(features, directions)
    )


@pytest.mark.parametrize("seed", range(3))
def test_class_activation_map(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, CHANNELS, 4, 3, generator=generator)
    weight = torch.randn(5, CHANNELS, generator=generator)

    maps = class_activation_map(features, weight).numpy()

    expected = activation.class_activation_map(features.numpy(), weight.numpy())
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5)
    assert (expected == 0).any()
    assert (expected > 0).any()


any_maps = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(any_maps)
def test_normalized_maps_lie_in_the_unit_interval(values: np.ndarray) -> None:
    maps = normalize_maps(torch.from_numpy(values))
    assert maps.shape == values.shape
    assert ((maps >= 0) & (maps <= 1)).all()  # also false for NaN


@given(any_maps, st.sampled_from([0.0, 1e-5, 0.5]))
def test_normalize_maps(values: np.ndarray, eps: float) -> None:
    maps = normalize_maps(torch.from_numpy(values), eps).numpy()
    height, width = values.shape[-2:]
    for ours, theirs in zip(
        maps.reshape(-1, height, width), values.reshape(-1, height, width), strict=True
    ):
        if eps or theirs.max() > 0:
            expected = activation.normalize_map(theirs, eps)
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)
        else:
            assert not ours.any()


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.0, -0.0, -3.0])
def test_a_map_without_positive_values_stays_zero(value: float, eps: float) -> None:
    maps = torch.full((2, 3, 4), value)
    maps[1] = torch.arange(12.0).view(3, 4)
    normalized = normalize_maps(maps, eps)
    assert (normalized[0] == 0).all()
    assert normalized[1].max() == pytest.approx(1, abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(1, 1e4))
def test_normalize_maps_removes_the_scale(seed: int, factor: float) -> None:
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed)) + 1
    torch.testing.assert_close(
        normalize_maps(maps * factor), normalize_maps(maps), atol=2e-5, rtol=0
    )


def test_resize_leaves_what_fits() -> None:
    features = torch.rand(1, 2, 3, 4)
    assert resize(features, (3, 4)) is features
    assert resize(features, (5, 9)).shape == (1, 2, 5, 9)
    torch.testing.assert_close(resize(features[0], (5, 9)), resize(features, (5, 9))[0])
