"""Nonsense in a setting ends in one line that names it, before anything long is computed."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from lpcam.programs.build import build, trainer_maker
from lpcam.programs.entry import USER_ERRORS, _one_line
from lpcam.programs.options import options
from lpcam.programs.run import Run
from lpcam.programs.setup import set_up
from tests.conftest import ROOT, at

NETWORK = ("backbone=timm", "backbone.name=test_resnet", "backbone.weights=null")
QUICK = ("dataset=shapes", "logger=none", "trainer=cpu", *NETWORK)
OWN_CRF = "{iterations:3,gaussian_sxy:0,gaussian_weight:3,bilateral_sxy:5,bilateral_srgb:5,bilateral_weight:3}"  # noqa: E501

# What is chosen in the groups, and the odd values with what the line says of each.
ODD: dict[tuple[str, ...], dict[str, str]] = {
    (): {
        "seed=abc": "valid integer",
        "seed=-1": "greater than or equal to 0",
        "seed=4294967296": "less than 4294967296",
        "seed=0.5": "valid integer",
        "num_workers=-1": "greater than or equal to 0",
        "num_workers=two": "valid integer",
        "num_workers=1000000": "less than or equal to 256",
        "report=maybe": "valid boolean",
        "report=1": "valid boolean",
        "shown_pictures=[]": "at least 1 item",
        "shown_pictures=train_00000": "should be a list: [train_00000]",
        "shown_pictures=[7]": "valid string",
        "ckpt=3": "valid string",
        "ckpt=''": "at least 1 character",
        "paths.store=null": "valid string",
        "paths.output=5": "valid string",
        "prototypes.k=abc": "valid integer",
        "prototypes.k=0": "greater than or equal to 1",
        "prototypes.k=true": "valid integer",
        "prototypes.use=all": "'both', 'class' or 'context'",
        "prototypes.images_per_class=0": "greater than or equal to 1",
        "prototypes.with_replacement=maybe": "valid boolean",
        "prototypes.split=double": "'single_view' or 'multi_scale'",
        "prototypes.init=zeros": "'k-means++' or 'random'",
        "prototypes.tol=nan": "finite number",
        "prototypes.max_iter=0": "greater than or equal to 1",
        "prototypes.fallback=none": "'best' or 'error'",
        "prototypes.seed=-1": "greater than or equal to 0",
        "prototypes.allow_missing=yes": "",
        "thresholds.activation=null": "valid number",
        "thresholds.activation=1.5": "less than or equal to 1",
        "thresholds.class_score=nan": "finite number",
        "thresholds.context_score=-0.1": "greater than or equal to 0",
        "thresholds.context_floor=inf": "",
        "thresholds.seed_background=7": "less than or equal to 1",
        "thresholds.seed_background=nan": "finite number",
        "thresholds.unsure_band=-1": "greater than or equal to 0",
        "thresholds.unsure_band=wide": "valid number",
        "inference.scales=[]": "at least 1 item",
        "inference.scales=[0]": "greater than 0",
        "inference.scales=[1.0,big]": "valid number",
        "inference.scales=1.0": "valid tuple",
        "inference.flip=maybe": "valid boolean",
        "inference.eps=-1": "greater than or equal to 0",
        "inference.batch_size=0": "greater than or equal to 1",
        "inference.keep_features=lots": "valid number",
        "refiner.source=gradcam": "'cam' or 'lpcam'",
        "trainer.accelerator=gpux": "Available names",
        "trainer.devices=0": "cpu accelerator",
        "trainer.devices=few": "int > 0",
        "trainer.devices=1.5": "valid",
        "trainer.precision=foo": "choose 32-true, bf16-mixed or 16-mixed",
        "trainer.precision=null": "valid",
        "trainer.enable_model_summary=maybe": "valid boolean",
        "trainer.log_every_n_steps=0": "greater than or equal to 1",
        "+trainer.limits=3": "unexpected keyword argument",
        "+trainer.strategy=no_such": "invalid strategy",
    },
    ("train.py",): {
        "backbone.name=5": "valid string",
        "backbone.name=no_such_net": "unknown",
        "backbone.weights=true": "valid string",
        "backbone.weights=nowhere.pth": "no such file",
        "classifier.epochs=0": "greater than or equal to 1",
        "classifier.epochs=ten": "valid integer",
        "classifier.validate_every=0": "greater than or equal to 1",
        "classifier.batch_size=0": "greater than or equal to 1",
        "classifier.optimizer=lion": "'sgd' or 'adamw'",
        "classifier.lr=0": "greater than 0",
        "classifier.lr=1e30": "less than or equal to 1000000",
        "classifier.lr=nan": "finite number",
        "classifier.head_lr_factor=-1": "greater than 0",
        "classifier.momentum=1.0": "less than 1",
        "classifier.weight_decay=-1": "greater than or equal to 0",
        "classifier.poly_power=inf": "",
        "classifier.freeze_stem=maybe": "valid boolean",
        "classifier.freeze_backbone=1": "valid boolean",
        "classifier.long_side=[640,320]": "smaller value first",
        "classifier.long_side=640": "valid tuple",
        "classifier.crop=0": "greater than or equal to 1",
        "+classifier.rate=1": "nexpected keyword argument",
        "dataset.seed=-1": "greater than or equal to 0",
        "dataset.train=0": "greater than or equal to 1",
        "dataset.val=many": "valid integer",
        "dataset.sizes=[]": "at least 1 item",
        "dataset.sizes=[8]": "greater than or equal to 32",
        "dataset.pair_probability=2": "less than or equal to 1",
        "dataset.single_span=[0.9,0.7]": "smaller value first",
        "dataset.pair_span=[0.5]": "",
        "dataset.min_visible=0": "greater than or equal to 0.01",
        "dataset.context_probability=nan": "finite number",
        "dataset.tilt=100": "less than or equal to 90",
        "dataset.jpeg_quality=0": "greater than or equal to 1",
        "dataset.train_split=test": "no split 'test'; choose from train, val",
        "dataset.prototype_split=null": "valid string",
        "dataset.map_splits=[val,val]": "give each once",
        "dataset.map_splits=[]": "at least 1 item",
        "dataset.map_splits=val": "should be a list: [val]",
        "+dataset.flip=true": "nexpected keyword argument",
    },
    ("train.py", "dataset=cutouts"): {
        "dataset.train_share=1.5": "less than or equal to 1",
        "dataset.brightness=[2,1]": "smaller value first",
        "dataset.background_zoom=[0,1]": "greater than or equal to 0.05",
    },
    ("train.py", "dataset=voc"): {
        "+dataset.val_split=null": "dataset.root: needs a value; add dataset.root=",
    },
    ("train.py", "dataset=voc", "dataset.root=nowhere"): {
        "dataset.difficult=maybe": "valid boolean",
        "dataset.train_aug_list=5": "valid string",
        "dataset.classes=[cat]": "at least 2 items",
        "dataset.classes=[cat,cat]": "give each once",
        "dataset.classes=[cat,cowe]": "no class 'cowe' among aeroplane, bicycle",
        "dataset.val_list=3": "valid string",
        "dataset.root=null": "valid string",
    },
    ("train.py", "dataset=coco", "dataset.root=nowhere"): {
        "dataset.year=2015": "2014 or 2017",
        "dataset.year='2014'": "2014 or 2017",
        "dataset.crowd=none": "'background', 'ignore' or 'foreground'",
        "dataset.unlabelled=maybe": "'keep' or 'drop'",
    },
    ("train.py", "dataset=folder"): {"+dataset.none=1": "dataset.root: needs a value"},
    ("refiner=par",): {
        "refiner.background=2": "less than or equal to 1",
        "refiner.stride=0": "greater than or equal to 1",
        "refiner.dilations=[]": "at least 1 item",
        "refiner.dilations=[0]": "greater than or equal to 1",
        "refiner.iterations=-1": "greater than or equal to 0",
        "refiner.contrast=0": "greater than or equal to 0.001",
        "refiner.position_weight=nan": "finite number",
        "refiner.device=cuda:9": "no such device here",
        "refiner.device=toaster": "no such device here",
    },
    ("refiner=crf",): {
        "refiner.parameters=best": "choose from irn_labels, psa",
        f"refiner.parameters={OWN_CRF}": "gaussian_sxy=0: should be greater than or equal to 0.01",
        "refiner.unary=soft": "'constant', 'power' or 'labels'",
        "refiner.unary_background=7": "a score in 0..1",
        "refiner.image_mode=bgr": "'raw' or 'legacy_wrap'",
        "refiner.backend=fast": "'pydensecrf' or 'exact'",
    },
    ("refiner=irn",): {
        "refiner.thresholds=best": "choose from lpcam, irn",
        "refiner.conf_fg=1.2": "less than or equal to 1",
        "refiner.conf_bg=0.9": "give at most refiner.conf_fg",
        "refiner.power=0": "greater than 0",
        "refiner.labels=sam": "'par' or 'crf'",
        "refiner.radius=1": "greater than or equal to 2",
        "refiner.crop=64": "multiple of 4",
        "refiner.scales=[1.5,0.5]": "smaller value first",
        "refiner.epochs=0": "greater than or equal to 1",
        "refiner.batch_size=0": "greater than or equal to 1",
        "refiner.lr=-1": "greater than 0",
        "refiner.walk_radius=1": "greater than or equal to 2",
        "refiner.beta=nan": "finite number",
        "refiner.steps=0": "greater than or equal to 1",
    },
    ("refiner=psa",): {
        "refiner.powers=best": "choose from psa",
        "refiner.low=3": "give at most refiner.high",
        "refiner.high=0": "greater than 0",
        "refiner.crop=100": "multiple of 8",
        "refiner.steps=-3": "greater than or equal to 1",
    },
    ("refiner=saliency",): {"+refiner.none=1": "refiner.folder: needs a value"},
    ("refiner=saliency", "refiner.folder=nowhere"): {
        "refiner.folder=5": "valid string",
        "refiner.theta=3": "less than 2.55",
        "refiner.alpha=-1": "greater than or equal to 0",
        "refiner.beta=2": "less than or equal to 1",
        "refiner.crf=best": "choose from irn_labels, psa",
        "refiner.backend=fast": "'pydensecrf' or 'exact'",
    },
    ("refiner=sam",): {"+refiner.none=1": "refiner.folder: needs a value"},
    ("refiner=sam", "refiner.folder=nowhere"): {
        "refiner.seed_background=nan": "finite number",
        "refiner.mask_share=1.5": "less than or equal to 1",
        "refiner.class_share=null": "valid number",
    },
}
CASES = [(groups, odd, words) for groups, table in ODD.items() for odd, words in table.items()]


@pytest.fixture(autouse=True)
def at_conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("PROJECT", str(ROOT)), ("SWEEP", "none"), ("ROOT", "nowhere")):
        monkeypatch.setenv(f"LPCAM_{name}", value)
    yield
    GlobalHydra.instance().clear()


@functools.cache
def composed(name: str, *overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            name, overrides=["paths.root=nowhere", "paths.output=nowhere", *QUICK, *overrides]
        )


def parsed(odd: str) -> tuple[str, Any]:
    (override,) = OverridesParser.create().parse_overrides([odd])
    return override.key_or_group, override.value()


def start(groups: tuple[str, ...], odd: str) -> None:
    """Do what the program does before it computes anything."""
    name = "train" if "train.py" in groups else "infer"
    cfg = composed(name, *(group for group in groups if group != "train.py")).copy()
    with open_dict(cfg):
        OmegaConf.update(cfg, *parsed(odd))
    options(cfg)
    if name == "infer":
        Run(cfg, [])
    else:
        trainer_maker(cfg.trainer)
        set_up(cfg)


@pytest.mark.parametrize(
    ("groups", "odd", "words"), CASES, ids=[" ".join((*groups, odd)) for groups, odd, _ in CASES]
)
def test_an_odd_value_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: tuple[str, ...],
    odd: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(USER_ERRORS) as caught:
        start(groups, odd)
    line = _one_line(caught.value)
    assert "\n" not in line
    assert words in line
    key, value = parsed(odd)
    if "needs a value" not in words and "no s" not in words:
        assert key in line
        parts = [value]
        if isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, list):
            parts = [value, tuple(value), *value]
        assert any(str(part) in line for part in parts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "computed before"


def test_what_is_there_by_default_is_let_through(tmp_path: Path) -> None:
    """Otherwise the lines above would say nothing."""
    cfg = composed("infer").copy()
    cfg.paths.root = str(tmp_path)
    with pytest.raises(USER_ERRORS, match="train it first"):
        Run(cfg, [])


@pytest.mark.parametrize("recipe", ["paper", "code"])
@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_what_recipes_say_is_let_through(tmp_path: Path, recipe: str, dataset: str) -> None:
    groups = (f"recipe={recipe}", f"dataset={dataset}", f"dataset.root={tmp_path}")
    cfg = composed("infer", "backbone.weights=null", *groups)
    with pytest.raises(USER_ERRORS, match=rf"^{tmp_path}/.*no such split"):
        set_up(cfg)
    with pytest.raises(USER_ERRORS, match=rf"^{tmp_path}/.*no such split"):
        Run(cfg, [])


@pytest.mark.parametrize(
    ("name", "odd", "start"),
    [
        ("train", "seed=abc", "seed='abc': should be a valid integer"),
        ("train", "classifier.momentum=2", "classifier.momentum=2: should be less than 1"),
        ("train", "trainer.accelerator=tpu", "trainer.accelerator=tpu"),
        ("train", "dataset.map_splits=[]", "dataset.map_splits=[]: "),
        ("train", "dataset=voc", "dataset.root: needs a value; add dataset.root=... to the comm"),
        ("train", "dataset=folder", "dataset.root: needs a value; add dataset.root=... to the "),
        ("infer", "prototypes.use=all", "prototypes.use='all': should be 'both', 'class' or "),
        ("infer", "paths.store=null", "paths.store=None: should be a valid string"),
        ("infer", "dataset.map_splits=[]", "dataset.map_splits=[]: "),
        ("infer", "refiner=par refiner.stride=0", "refiner.stride=0: should be greater than or"),
        ("infer", "refiner=saliency", "refiner.folder: needs a value; add refiner.folder=... to"),
    ],
)
def test_a_program_ends_with_status_1_and_that_line(
    program: Any, tmp_path: Path, name: str, odd: str, start: str
) -> None:
    outcome = program(name, *QUICK, *odd.split(), *at(tmp_path))
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: {start}")


def test_by_the_real_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lpcam", "train", "num_workers=-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: num_workers=-1: should be greater than or equal to 0\n"


def test_a_job_of_a_sweep_says_so_too(program: Any, tmp_path: Path) -> None:
    outcome = program(
        "infer", "-m", *QUICK, "num_workers=-1", f"paths.root={tmp_path}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert outcome.status == 1
    (failure,) = (tmp_path / "sweep").glob("*/FAILED.txt")
    assert failure.read_text().startswith("num_workers=-1: should be greater than or equal to 0")


def test_a_data_set_is_checked_by_check_too(tmp_path: Path) -> None:
    cfg = composed("train", "dataset=voc", "dataset.root=nowhere", "dataset.classes=[cat]")
    with pytest.raises(USER_ERRORS, match=r"^dataset\.classes=\['cat'\]: .*at least 2 items"):
        build(cfg.dataset)
