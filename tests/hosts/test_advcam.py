"""Anti-adversarial climbing: exact on a linear toy model, and as a maker of any host's maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.hosts.advcam import AdvCAM, Climbing, climb
from lpcam.hosts.edam import EDAM
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import Host, load_host
from tests.oracles import advcam


class Plain(Host):
    """Its features are the picture."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(nn.Identity(), len(weight))  # type: ignore[arg-type]
        self.weight = weight

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        return torch.einsum("cd,ndyx->ncyx", self.weight, features).relu()

    def score(self, vectors: Tensor) -> Tensor:
        return vectors @ self.weight.T

    @property
    def score_key(self) -> str:
        return ""


def test_one_step_by_hand() -> None:
    """Two pixels of two channels; class 0 reads the first channel, class 1 the second."""
    picture = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]], dtype=torch.float64)
    host = Plain(torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    how = Climbing(steps=2, step_size=0.5, regularization=7, strong=0.5)
    (found,) = climb(host, picture[None], torch.ones(2), 0, how, 2)
    # Scores are (1, 2) and (6, -2). The gradient is 1/2 for the first channel, and -2/2 for the
    # second where it is positive: divided by 1, times 0.5, the first channel rises by 0.25, but 2
    # to 2.25 only as far as the largest value 3 allows, which is no bound here.
    expected = np.array([[1 + 1.25, 2 + 2.25]])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("regularization", [0.0, 0.01, 7.0])
def test_many_steps(regularization: float) -> None:
    rng = np.random.default_rng(1)
    picture, weight = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 3))
    how = Climbing(step_size=0.3, regularization=regularization, strong=0.5)
    host = Plain(torch.tensor(weight))
    (found,) = climb(host, torch.tensor(picture)[None], torch.ones(3), 1, how, 6)
    expected, _ = advcam.climb(
        picture, weight, 1, steps=6, step_size=0.3, regularization=regularization, strong=0.5
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_mirror_image_climbs_along() -> None:
    """Of a network that sees single positions, both views have the same maps."""
    rng = np.random.default_rng(2)
    picture, host = (
        torch.tensor(rng.normal(size=(3, 4, 5))),
        Plain(torch.tensor(rng.normal(size=(2, 3)))),
    )
    views = torch.stack([picture, picture.flip(2)])
    first, second = climb(host, views, torch.ones(2), 0, Climbing(regularization=0), 5)
    torch.testing.assert_close(first, second)
    (alone,) = climb(host, views[:1], torch.ones(2), 0, Climbing(regularization=0), 5)
    torch.testing.assert_close(first, alone)


def batch(flip: bool) -> ViewBatch:
    return {
        "ids": ["a", "b"],
        "labels": torch.tensor([[1.0, 0, 1], [0, 0, 0]]),
        "size": (64, 96),
        "views": [torch.randn(2, 3, 32, 48), torch.randn(2, 3, 64, 96)],
        "flip": flip,
    }


@pytest.mark.parametrize("flip", [True, False])
def test_maps_of_shown_classes_from_any_host(flip: bool) -> None:
    for inner in (Classifier, EDAM):
        base = inner(build_backbone("test_resnet", None), 3).eval()
        host = AdvCAM(base, steps=3)
        given = batch(flip)
        with torch.no_grad():
            plain, climbed = base.predict_step(given, 0), host.predict_step(given, 0)
        for before, after in zip(plain, climbed, strict=True):
            torch.testing.assert_close(after.features, before.features)
            assert before.maps is not None
            assert after.maps is not None
            assert after.maps.shape == before.maps.shape
            assert not after.maps[:, 1].any()
            assert not after.maps[:, 0, 1].any()
            shown = [maps[:, 0, [0, 2]] for maps in (before.maps, after.maps)]
            assert (shown[1] > shown[0] - 1e-5).all()  # own maps are those of the first step
            assert (shown[1] > 1.5 * shown[0]).any()
        assert host.score_key != base.score_key
        assert host.feature_key == base.feature_key


def test_the_first_step_is_the_hosts_own_map() -> None:
    base = Classifier(build_backbone("test_resnet", None), 3).eval()
    given = batch(True)
    with torch.no_grad():
        plain, climbed = base.predict_step(given, 0), AdvCAM(base, steps=1).predict_step(given, 0)
    for before, after, times in zip(plain, climbed, (2, 1), strict=True):  # half scale counts twice
        assert before.maps is not None
        assert after.maps is not None
        for c in (0, 2):
            torch.testing.assert_close(
                after.maps[:, 0, c], times * before.maps[:, 0, c], rtol=1e-4, atol=1e-5
            )


def test_it_is_the_classifier_to_whatever_loads_it(tmp_path: Path) -> None:
    base = Classifier(build_backbone("test_resnet", None), 3).eval()
    torch.save(AdvCAM(base).state_dict(), tmp_path / "saved.ckpt")
    load_host(tmp_path / "saved.ckpt", Classifier(build_backbone("test_resnet", None), 3))
    twin = AdvCAM(base, steps=5).for_inference()
    assert twin.how == Climbing(steps=5)
    assert twin.score_key == AdvCAM(base, steps=5).score_key


@pytest.mark.parametrize(
    ("options", "told"), [({"steps": 0}, r"maps\.steps=0"), ({"x": 1}, "maps.x")]
)
def test_a_wrong_setting_is_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        AdvCAM(Classifier(build_backbone("test_resnet", None), 3), **options)
