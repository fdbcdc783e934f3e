"""Every host from training to maps, by the program's own way, on tiny data and a tiny network."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lpcam.programs.setup import set_up
from tests.conftest import ROOT, TINY, at

CONF = ROOT / "conf"

NETWORK = (
    "backbone=timm",
    "backbone.name=test_resnet",
    "backbone.weights=null",
    "dataset.train=8",
    "dataset.val=4",
    "dataset.sizes=[64,80]",
)
FEW = (
    "prototypes.k=2",
    "prototypes.allow_missing=true",
    "thresholds.class_score=0",
    "inference.scales=[1.0,1.5]",
    "report=false",
)
SMALL = ("classifier.long_side=[64,80]", "classifier.crop=64", "classifier.batch_size=4")
HOSTS: dict[str, tuple[str, ...]] = {
    "recam_small": ("classifier.base.epochs=1", "classifier.base.validate_every=1"),
    "amn_small": (
        *SMALL,
        "classifier.base.epochs=1",
        "classifier.base.validate_every=1",
        "classifier.seeds.inference.scales=[1.0]",
    ),
    "edam_small": (*SMALL, "classifier.dim=8"),
    "erasing_small": (*SMALL, "classifier.base.epochs=1", "classifier.base.validate_every=1"),
}


def options(host: str, epochs: int = 1) -> tuple[str, ...]:
    training = (f"classifier.epochs={epochs}", "classifier.validate_every=1")
    return (*TINY, *NETWORK, f"classifier={host}", *training, *HOSTS[host])


def manifests(root: Path, stage: str) -> list[dict[str, Any]]:
    found = sorted((root / "store" / stage).glob("*/manifest.json"))
    return [json.loads(path.read_text())["inputs"] for path in found]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_trains_maps_and_sweeps(program, tmp_path: Path, host: str) -> None:
    train = options(host)
    outcome = program("train", *train, *at(tmp_path, "train"))
    assert outcome.status == 0, outcome.stderr
    assert "Trained: " in outcome.stdout
    # What it begins with is a stage of its own, which the plain classifier would find.
    bases = [inputs for inputs in manifests(tmp_path, "classifier") if "base" not in inputs]
    assert len(bases) == 1
    if host == "amn_small":  # its seeds depend on neither
        more = ("classifier.seeds.prototypes.k=5", "classifier.seeds.inference.batch_size=2")
        outcome = program("train", *train, *more, *at(tmp_path, "again"))
        assert "Already trained" in outcome.stdout

    outcome = program(
        "infer",
        "-m",
        *train,
        *FEW,
        "prototypes.k=2,3",
        f"paths.root={tmp_path}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert outcome.status == 0, outcome.stderr
    found = [json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/metrics.json")]
    assert len(found) == 2
    for metrics in found:
        for split in ("train", "val"):
            assert 0 < metrics[f"{split}/cam/miou"] < 1
            assert 0 < metrics[f"{split}/lpcam/miou"] < 1
    assert found[0]["val/cam/miou"] == found[1]["val/cam/miou"]
    maps = {inputs["head"] for inputs in manifests(tmp_path, "maps")}
    assert maps == {"host", "lpcam"}


def test_a_killed_training_of_a_host_finds_its_base(
    program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpcam.hosts.recam import ReCAM

    train = options("recam_small", epochs=2)
    step = ReCAM.training_step

    def dies(self: ReCAM, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ReCAM, "training_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        program("train", *train, *at(tmp_path))
    (base,) = tmp_path.glob("store/classifier/*/manifest.json")
    epochs = []

    def counts(self: ReCAM, batch: Any, batch_idx: int) -> Any:
        epochs.append(self.current_epoch)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ReCAM, "training_step", counts)
    before = base.stat().st_mtime_ns
    outcome = program("train", *train, *at(tmp_path))
    assert outcome.status == 0, outcome.stderr
    assert set(epochs) == {1}
    assert base.stat().st_mtime_ns == before


def test_amn_learns_from_lpcam_too(program, tmp_path: Path) -> None:
    train = (
        *options("amn_small"),
        "classifier.lpcam=upstream",
        "classifier.seeds.prototypes.k=2",
        "classifier.seeds.prototypes.allow_missing=true",
        "classifier.seeds.thresholds.class_score=0",
    )
    outcome = program("train", *train, *at(tmp_path, "train"))
    assert outcome.status == 0, outcome.stderr
    assert [inputs["head"] for inputs in manifests(tmp_path, "maps")] == ["lpcam"]
    (settings,) = [i["settings"] for i in manifests(tmp_path, "classifier") if "base" in i]
    assert settings["seeds"]["clustering"]["k"] == 2
    assert len(list(tmp_path.glob("store/seeds/*/*.png"))) == 8


def test_a_host_says_what_it_lacks(program, tmp_path: Path) -> None:
    outcome = program("infer", *options("amn_small"), *at(tmp_path))
    assert outcome.status == 1
    assert "classifier=amn_small" in outcome.stderr
    outcome = program("train", *options("amn_small"), "classifier.lpcam=both", *at(tmp_path))
    assert "classifier.lpcam=both: choose inplace or upstream" in outcome.stderr
    odd = program("train", *options("edam_small"), "classifier.batch_size=3", *at(tmp_path))
    assert "classifier.batch_size=3" in odd.stderr
    assert odd.stderr.count("\n") <= 2


@pytest.mark.parametrize(
    ("maps", "option", "title"),
    [("advcam", "maps.steps=2", "AdvCAM"), ("erasing", "maps.looks=2", "Erasing")],
)
def test_remade_maps_in_the_place_of_own_maps(
    program, tmp_path: Path, maps: str, option: str, title: str
) -> None:
    train = (*TINY, *NETWORK, "classifier.epochs=1", "classifier.validate_every=1")
    program("train", *train, *at(tmp_path, "train"))
    few = (f"maps={maps}", option, "inference.scales=[1.0]")
    outcome = program("infer", *train, *FEW, *few, *at(tmp_path))
    assert outcome.status == 0, outcome.stderr
    assert title in outcome.stdout
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < scores["val/cam/miou"] < 1
    # Features are split by the maps of changed pictures, which features alone do not tell.
    assert [i["score"] for i in manifests(tmp_path, "features") if "score" in i]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("classifier/*.yaml")))
def test_every_host_is_built_as_its_config_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCAM_PROJECT", str(ROOT))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [*TINY, *NETWORK, f"classifier={name}", f"paths.root={tmp_path}"]
        if name.startswith(("mctformer", "vit")):
            given.append("backbone.name=test_vit")
        cfg = compose("train", given)
    cfg.paths.output = cfg.dataset.root = str(tmp_path)
    found = set_up(cfg)
    assert type(found.host).__module__ == cfg.classifier._target_.rsplit(".", 1)[0]
    assert (found.base is not None) == ("base" in cfg.classifier)
    assert (found.seeding is not None) == (found.host.batches == "seeds")
    if found.base:
        assert found.stage.inputs["base"] == found.base.stage.key
