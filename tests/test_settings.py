import re
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pydantic
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from lpcam.errors import InputError
from lpcam.programs.build import settings
from lpcam.prototypes.centers import Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.selection import Selection
from lpcam.settings import CHECKED, Count, Share, make, wrong_value
from lpcam.stages.batches import Fitting
from lpcam.stages.maps import Inference
from lpcam.stages.passes import ViewSettings

NAN, INFINITY = float("nan"), float("inf")
# What has no default.
NEEDED: dict[type, dict[str, Any]] = {
    Fitting: {"epochs": 1, "validate_every": 1, "batch_size": 1},
    Inference: {"scales": [1.0], "flip": True},
    ViewSettings: {"scales": [1.0], "flip": True},
}
WHOLE, NUMBER, YES = "should be a valid integer", "should be a valid number", "valid boolean"

WRONG = [
    (Clustering, "k", 0, "should be greater than or equal to 1"),
    (Clustering, "k", -3, "should be greater than or equal to 1"),
    (Clustering, "k", 2.0, WHOLE),
    (Clustering, "k", "12", WHOLE),
    (Clustering, "k", True, WHOLE),
    (Clustering, "k", None, WHOLE),
    (Clustering, "k", [12], WHOLE),
    (Clustering, "activation", -0.001, "should be greater than or equal to 0"),
    (Clustering, "activation", 1.001, "should be less than or equal to 1"),
    (Clustering, "activation", "0.1", NUMBER),
    (Clustering, "activation", False, NUMBER),
    (Clustering, "activation", NAN, "should be a finite number"),
    (Clustering, "activation", -INFINITY, "should be"),
    (Clustering, "split", "both", "should be 'single_view' or 'multi_scale'"),
    (Clustering, "split", None, "should be 'single_view' or 'multi_scale'"),
    (Clustering, "init", "first\nsecond", "should be 'k-means++' or 'random'"),
    (Clustering, "tol", -1e-9, "should be greater than or equal to 0"),
    (Clustering, "tol", NAN, "should be a finite number"),
    (Clustering, "tol", INFINITY, "should be a finite number"),
    (Clustering, "max_iter", 0, "should be greater than or equal to 1"),
    (Clustering, "seed", -1, "should be greater than or equal to 0"),
    (Clustering, "seed", 2**32, "should be less than 4294967296"),
    (Clustering, "allow_missing", 1, YES),
    (Clustering, "allow_missing", "true", YES),
    (Draw, "images_per_class", 0, "should be greater than or equal to 1"),
    (Draw, "images_per_class", 1.5, WHOLE),
    (Draw, "with_replacement", "no", YES),
    (Draw, "seed", 0.5, WHOLE),
    (Selection, "class_score", 1.5, "should be less than or equal to 1"),
    (Selection, "class_score", None, NUMBER),
    (Selection, "context_score", -1, "should be greater than or equal to 0"),
    (Selection, "context_floor", NAN, "should be a finite number"),
    (Selection, "context_floor", 2, "should be less than or equal to 1"),
    (Selection, "fallback", "none", "should be 'best' or 'error'"),
    (Inference, "flip", 0, YES),
    (Inference, "scales", 1.0, "should be a valid tuple"),
    (Inference, "scales", [], "at least 1 item"),
    (Inference, "eps", NAN, "should be a finite number"),
    (Inference, "batch_size", 0, "should be greater than or equal to 1"),
    (Inference, "keep_features", -1.0, "should be greater than or equal to 0"),
    (ViewSettings, "scales", "1.0", "should be a valid tuple"),
    (Fitting, "epochs", 0, "should be greater than or equal to 1"),
    (Fitting, "long_side", [320, 640, 960], "at most 2 items"),
    (Fitting, "crop", 0.5, WHOLE),
]


@pytest.mark.parametrize(("kind", "name", "value", "reason"), WRONG)
def test_a_wrong_value_is_one_line(kind: type, name: str, value: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        make(kind, {**NEEDED.get(kind, {}), name: value}, "group.{}".format)
    message = str(caught.value)
    assert message.startswith(f"group.{name}={value!r}: ")
    assert reason in message
    assert "\n" not in message
    assert "Input" not in message


@pytest.mark.parametrize(("kind", "name", "value", "reason"), WRONG)
def test_a_wrong_value_is_refused_without_a_config_too(
    kind: type, name: str, value: Any, reason: str
) -> None:
    given = {
        field: tuple(v) if isinstance(v, list) else v
        for field, v in {**NEEDED.get(kind, {}), name: value}.items()
    }
    with pytest.raises(ValidationError, match=re.escape(reason)):
        kind(**given)


@pytest.mark.parametrize(
    ("kind", "name", "value", "start"),
    [
        (Inference, "scales", [0.5, "1"], r"scales\[1\]='1': should be a valid number"),
        (Inference, "scales", [0.5, 9.0, 1.0], r"scales\[1\]=9\.0: should be less than or equal"),
        (Inference, "scales", [0, 1.0], r"scales\[0\]=0: should be greater than 0"),
        (Inference, "scales", [1.0, 2.0, NAN], r"scales\[2\]=nan: should be a finite number"),
        (Fitting, "long_side", [320, 0], r"long_side\[1\]=0: should be greater than or equal"),
        (Fitting, "long_side", [1.5, 2], r"long_side\[0\]=1\.5: should be a valid integer"),
        (Fitting, "long_side", [320], r"long_side\[1\]=.*Field required"),
    ],
)
def test_the_wrong_item_of_a_list_is_named(kind: type, name: str, value: Any, start: str) -> None:
    with pytest.raises(InputError, match=f"^{start}") as caught:
        make(kind, {**NEEDED[kind], name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [Clustering, Draw, Selection, Inference, ViewSettings, Fitting],
    ids=lambda k: k.__name__,
)
def test_an_unknown_field_is_named(kind: type) -> None:
    with pytest.raises(InputError, match=r"^group\.tau=0\.3: .+$") as caught:
        make(kind, {**NEEDED.get(kind, {}), "tau": 0.3}, "group.{}".format)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, values in NEEDED.items() for name in values],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_missing_field_is_named(kind: type, name: str) -> None:
    values = {other: value for other, value in NEEDED[kind].items() if other != name}
    with pytest.raises(InputError, match=rf"^group\.{name}\b.*required$") as caught:
        make(kind, values, "group.{}".format)
    assert "\n" not in str(caught.value)


def test_of_several_mistakes_the_first_is_named() -> None:
    with pytest.raises(InputError, match=r"^k=0: [^;]*$"):
        make(Clustering, {"activation": 7.0, "k": 0, "seed": -1})


def test_keys_are_what_the_user_calls_a_field() -> None:
    keys = {"k": "prototypes.k", "activation": "thresholds.activation"}
    for values, start in (({"k": 0}, "prototypes.k=0"), ({"activation": 2}, "thresholds.activa")):
        with pytest.raises(InputError, match=f"^{start}"):
            make(Clustering, values, keys.__getitem__)


def test_lists_become_tuples() -> None:
    """A config has lists; settings are frozen, and can be keys."""
    inference = make(Inference, {"scales": [0.5, 1.0], "flip": True})
    assert inference.scales == (0.5, 1.0)
    fitting = make(Fitting, {**NEEDED[Fitting], "long_side": [320, 640]})
    assert fitting.long_side == (320, 640)
    assert len({inference, make(Inference, {"scales": (0.5, 1.0), "flip": True})}) == 1
    assert len({fitting, make(Fitting, {**NEEDED[Fitting], "long_side": (320, 640)})}) == 1


def test_scales_are_kept_in_order_and_once() -> None:
    given = {"scales": [2, 0.5, 1.0, 2.0, 1], "flip": False}
    for kind in (ViewSettings, Inference):
        assert make(kind, given).scales == (0.5, 1.0, 2.0)
    assert make(Inference, given).views == make(ViewSettings, given)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Clustering, {"k": 1, "activation": 0, "tol": 0, "max_iter": 1, "seed": 0}),
        (Clustering, {"activation": 1.0, "tol": 5, "seed": 2**32 - 1, "allow_missing": True}),
        (Clustering, {"split": "multi_scale", "init": "random"}),
        (Draw, {"images_per_class": None, "with_replacement": True}),
        (Draw, {"images_per_class": 1, "seed": 666}),
        (Selection, {"class_score": 0, "context_score": 1, "context_floor": None}),
        (Selection, {"class_score": 1.0, "context_floor": 0, "fallback": "error"}),
        (Inference, {"scales": (0.01, 8.0), "flip": False, "eps": 0, "keep_features": 0}),
        (Fitting, {**NEEDED[Fitting], "long_side": None, "crop": None}),
    ],
)
def test_what_is_allowed_is_kept(kind: type, values: dict[str, Any]) -> None:
    made = asdict(make(kind, values))
    assert {name: made[name] for name in values} == values
    assert kind(**values) == make(kind, values)


@pytest.mark.parametrize("kind", [Clustering, Draw, Selection])
def test_settings_are_frozen(kind: type) -> None:
    made = kind()
    name = next(iter(asdict(made)))
    with pytest.raises(FrozenInstanceError):
        setattr(made, name, getattr(made, name))


def test_a_constructor_that_checks_its_arguments_is_told_of_likewise() -> None:
    class Box:
        @pydantic.validate_call(config=CHECKED)
        def __init__(self, *, width: Count, share: Share = 1.0) -> None:
            self.area = width * share

    assert Box(width=4, share=0.5).area == 2
    for values, start in (
        ({"width": 0}, r"box\.width=0: should be greater than or equal to 1$"),
        ({"width": 1, "share": NAN}, r"box\.share=nan: should be a finite number$"),
        ({"width": 1, "height": 2}, r"box\.height=2: "),
    ):
        with pytest.raises(ValidationError) as caught:
            Box(**values)
        line = wrong_value(caught.value, "box.{}".format)
        assert isinstance(line, InputError)
        assert re.match(start, str(line))
        assert "\n" not in str(line)


CONFIG = """
prototypes: {k: 3, init: random, seed: 7, use: both, images_per_class: null}
thresholds: {activation: 0.2, seed: 8, seed_background: 0.5}
inference: {scales: [1.0, 0.5], flip: true, eps: 0}
"""


def test_settings_come_from_the_first_node_that_has_them() -> None:
    cfg = OmegaConf.create(CONFIG)
    made = settings(Clustering, cfg.prototypes, cfg.thresholds)
    assert made == Clustering(k=3, init="random", seed=7, activation=0.2)
    assert settings(Clustering, cfg.thresholds, cfg.prototypes).seed == 8
    assert settings(Draw, cfg.prototypes) == Draw(seed=7)
    assert settings(Inference, cfg.inference) == Inference((0.5, 1.0), True, eps=0)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (Clustering, "prototypes.k=0", r"^prototypes\.k=0: should be greater"),
        (Clustering, "thresholds.activation=2", r"^thresholds\.activation=2: should be less"),
        (Clustering, "prototypes.seed=-1", r"^prototypes\.seed=-1: should be greater"),
        (Draw, "prototypes.images_per_class=many", r"^prototypes\.images_per_class='many': "),
        (Inference, "inference.scales=[1,nine]", r"^inference\.scales\[1\]='nine': "),
    ],
)
def test_a_mistake_in_a_config_has_its_key(kind: type, override: str, message: str) -> None:
    cfg = OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.from_dotlist([override]))
    nodes = [cfg.inference] if kind is Inference else [cfg.prototypes, cfg.thresholds]
    with pytest.raises(InputError, match=message):
        settings(kind, *nodes)
