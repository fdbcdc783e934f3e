"""Iterative erasing, by hand and through hosts."""

import pytest
import torch
from torch import Tensor

from lpcam.errors import InputError
from lpcam.hosts.edam import EDAM
from lpcam.hosts.iterative_erasing import IterativeErasing, Looks, look_again
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from tests.hosts.test_advcam import batch


class Sums:
    """Features are the pixels; class 0 has their rectified sum with the right neighbour."""

    def local_features(self, images: Tensor, labels: Tensor) -> Tensor:
        return images

    def own_maps(self, features: Tensor) -> Tensor:
        values = features.sum(1, keepdim=True)
        right = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
        return torch.cat([(values + right).relu(), values.relu()], 1)


def picture(*values: float) -> Tensor:
    row = torch.tensor(values, dtype=torch.float32)
    return torch.stack([row, torch.zeros_like(row), torch.zeros_like(row)])[:, None]


def test_three_looks_by_hand() -> None:
    """Pixels 4 1 0 3 have sums 5 1 3 3, without the first 1 1 3 3, then 1 1 0 0."""
    views = picture(4, 1, 0, 3)[None]
    how = Looks(looks=3, strong=0.9)
    found = look_again(Sums(), views, torch.ones(2), 0, how)  # type: ignore[arg-type]
    assert found.tolist() == [[[5, 1, 3, 3]]]
    # Of single pixels each look shows one less, so nothing exceeds the first.
    plain = look_again(Sums(), views, torch.ones(2), 1, how)  # type: ignore[arg-type]
    assert plain.tolist() == [[[4, 1, 0, 3]]]


def test_what_the_strongest_place_hid_is_found() -> None:
    """Pixels 5 -4 9: the second darkens the first, until it is erased for its bright neighbour."""
    found = look_again(Sums(), picture(5, -4, 9)[None], torch.ones(2), 0, Looks(2, 0.5))  # type: ignore[arg-type]
    # First 1, 5, 9; the second and third are erased: 5, 0, 0.
    assert found.tolist() == [[[5, 5, 9]]]


def test_both_views_lose_the_same_places() -> None:
    row = picture(1, 5, 2)
    views = torch.stack([row, row.flip(2)])
    seen: list[Tensor] = []

    class Noting(Sums):
        def local_features(self, images: Tensor, labels: Tensor) -> Tensor:
            seen.append(images[:, 0, 0])
            return images

    look_again(Noting(), views, torch.ones(2), 1, Looks(2, 0.9))  # type: ignore[arg-type]
    assert [look.tolist() for look in seen] == [
        [[1, 5, 2], [2, 5, 1]],
        [[1, 0, 2], [2, 0, 1]],
    ]


def test_a_map_of_zeros_ends_it() -> None:
    views = -picture(1, 2, 3)[None]
    found = look_again(Sums(), views, torch.ones(2), 0, Looks(5))  # type: ignore[arg-type]
    assert not found.any()


@pytest.mark.parametrize("flip", [True, False])
def test_maps_of_shown_classes_from_any_host(flip: bool) -> None:
    for inner in (Classifier, EDAM):
        base = inner(build_backbone("test_resnet", None), 3).eval()
        given = batch(flip)
        with torch.no_grad():
            plain = base.predict_step(given, 0)
            once = IterativeErasing(base, looks=1).predict_step(given, 0)
            often = IterativeErasing(base, looks=4, strong=0.5).predict_step(given, 0)
        grown = False
        for before, first, after in zip(plain, once, often, strict=True):
            assert before.maps is not None
            assert first.maps is not None
            assert after.maps is not None
            torch.testing.assert_close(after.features, before.features)
            assert not after.maps[:, 1].any()
            assert not after.maps[:, 0, 1].any()
            for c in (0, 2):
                own = before.maps[:, 0, c]
                torch.testing.assert_close(first.maps[:, 0, c], own, rtol=1e-4, atol=1e-5)
                assert (after.maps[:, 0, c] >= own - 1e-5).all()
                grown |= bool((after.maps[:, 0, c] > own + 1e-3).any())
        assert grown


def test_settings_are_checked_and_part_of_the_key() -> None:
    base = Classifier(build_backbone("test_resnet", None), 3).eval()
    keys = {
        IterativeErasing(base, **options).score_key
        for options in ({}, {"looks": 2}, {"strong": 0.5})
    }
    assert len(keys | {base.score_key}) == 4
    twin = IterativeErasing(base, looks=2).for_inference()
    assert twin.how == Looks(looks=2)
    with pytest.raises(InputError, match=r"maps\.strong=2"):
        IterativeErasing(base, strong=2.0)
