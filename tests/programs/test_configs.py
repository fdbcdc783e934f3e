"""Every option of every group composes, and every ``_target_`` is a class that may be called."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from lpcam.programs.build import ALLOWED_MODULES
from lpcam.programs.options import MAKING_MAPS, for_task
from lpcam.stages.batches import Fitting
from tests.conftest import ROOT

CONF = ROOT / "conf"
OPTIONS = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
CASES = [
    (program, option)
    for program in ("train", "infer")
    for option in OPTIONS
    if f"- {option.parent.name}: " in (CONF / f"{program}.yaml").read_text()
]


@pytest.fixture(autouse=True)
def hydra_at_conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LPCAM_PROJECT", str(ROOT))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        for item in value.values():
            yield from targets(item)


def config(program: str, *overrides: str) -> dict[str, Any]:
    cfg = compose(program, overrides=list(overrides))
    return OmegaConf.to_container(cfg)


@pytest.mark.parametrize(("program", "option"), CASES, ids=str)
def test_every_option_composes(program: str, option: Path) -> None:
    group, name = option.parent.name, option.stem
    cfg = config(program, f"{group}={name}")
    for target in targets(cfg):
        assert target.split(".")[0] in ALLOWED_MODULES
        assert callable(get_object(target))


@pytest.mark.parametrize("group", ["backbone", "trainer"])
def test_options_of_a_group_have_the_same_keys(group: str) -> None:
    """A value that exists in one exists in all: overrides work with each."""
    keys = [
        set(config("train", f"{group}={path.stem}")[group]) - {"strategy"}
        for path in (CONF / group).glob("*.yaml")
    ]
    assert all(found == keys[0] for found in keys)


CLASSIFIERS = sorted(path.stem for path in (CONF / "classifier").glob("*.yaml"))


def test_every_classifier_says_how_it_is_trained() -> None:
    for name in CLASSIFIERS:
        found = config("train", f"classifier={name}")["classifier"]
        assert found.keys() >= {field.name for field in fields(Fitting)} - {"augment"}
        assert (found["crop"] is None) == (name in ("frozen", "recam_small", "vit"))


def test_classifiers_of_one_kind_have_the_same_keys() -> None:
    """Overrides work with each: with a published setting, and with the small one."""
    kinds: dict[str, list[set[str]]] = {}
    for name in CLASSIFIERS:
        found = config("train", f"classifier={name}")["classifier"]
        kinds.setdefault(found["_target_"], []).append(set(found))
    assert {len(found) for found in kinds.values()} == {2, 4}
    assert all(keys == found[0] for found in kinds.values() for keys in found)


def test_a_base_can_be_chosen_and_changed() -> None:
    given = ("classifier=recam", "classifier@classifier.base=frozen", "classifier.base.lr=0.5")
    found = config("train", *given)["classifier"]["base"]
    assert found == {**config("train", "classifier=frozen")["classifier"], "lr": 0.5}


def test_a_host_brings_what_lpcam_needs_in_it() -> None:
    names = {path.stem for path in (CONF / "tuned" / "classifier").glob("*.yaml")}
    assert names < set(CLASSIFIERS)
    for name in CLASSIFIERS:
        found = config("infer", f"classifier={name}")["thresholds"]["activation"]
        assert found == (0.25 if name.startswith("amn") else 0.1)
    own = config("infer", "classifier=amn", "thresholds.activation=0.4")
    assert own["thresholds"]["activation"] == 0.4


@pytest.mark.parametrize("program", ["train", "infer"])
def test_networks_for_segmentation_have_the_same_keys(program: str) -> None:
    found = [
        config(program, "task=segmentation", f"segmenter={path.stem}")
        for path in sorted((CONF / "segmenter").glob("*.yaml"))
    ]
    assert len(found) == 3
    assert all(cfg["segmenter"].keys() == found[0]["segmenter"].keys() for cfg in found)
    left = for_task(OmegaConf.create(found[0]))
    assert not set(MAKING_MAPS) & set(left)
    assert {"segmenter", "masks", "dataset", "backbone"} <= set(left)


def test_train_and_infer_agree_on_the_network_for_segmentation() -> None:
    train, infer = (config(program, "task=segmentation") for program in ("train", "infer"))
    for group in ("dataset", "backbone", "segmenter", "masks", "seed", "paths"):
        assert train[group] == infer[group]


def test_train_and_infer_agree_on_the_classifier() -> None:
    """Otherwise infer.py would look for another classifier than train.py leaves."""
    train, infer = config("train"), config("infer")
    for group in ("dataset", "backbone", "classifier", "seed", "paths"):
        assert train[group] == infer[group]


STUDIES = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_study_composes_and_names_its_command(study: Path) -> None:
    line = study.read_text().splitlines()[1]  # Hydra wants the package on the first
    assert f"experiments={study.stem}" in line
    cfg = compose("infer", [f"experiments={study.stem}"], return_hydra_config=True)
    assert "hydra" not in cfg.get("experiments", {})
    swept = cfg.hydra.sweeper.params
    assert (cfg.hydra.mode is not None) == bool(swept)
    for key, values in (swept or {}).items():
        # What is swept is there to be changed.
        value = str(values).split(",")[0]
        if not value.startswith(("range", "interval")):
            compose("infer", [f"{key}={value}"])


def test_the_lists_of_the_study_on_genuine_pictures_are_whole_and_apart() -> None:
    names = [
        (ROOT / "experiments" / f"voc_animals_{split}.txt").read_text().split()
        for split in ("train", "val")
    ]
    assert [len(set(ids)) for ids in names] == [len(ids) for ids in names] == [437, 445]
    assert set(names[0]).isdisjoint(names[1])
