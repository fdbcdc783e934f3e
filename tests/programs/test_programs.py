"""train.py and infer.py from end to end, for real, on tiny data."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from lpcam.prototypes.prototype_set import Prototypes
from tests.conftest import ROOT, TINY, TINY_INFER, TINY_TRAIN, at, unpacked


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny classifier has been trained, by the real command line."""
    root = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "train.py", *TINY, *TINY_TRAIN, *at(root, "train")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to break."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def checkpoint(root: Path) -> Path:
    (path,) = root.glob("store/classifier/*/last.ckpt")
    return path


def metrics(root: Path, run: str) -> dict[str, float]:
    return json.loads((root / run / "metrics.json").read_text())


def test_train_leaves_a_safe_checkpoint_and_its_scores(trained: Path) -> None:
    state = torch.load(checkpoint(trained), weights_only=True)
    assert state["epoch"] == 100
    assert state["state_dict"]["head.weight"].shape[0] == 4
    assert set(metrics(trained, "train")) == {"train/loss", "val/loss", "val/map", "val/f1"}


def test_the_same_training_is_not_done_twice(program, copied: Path) -> None:
    before = checkpoint(copied).stat().st_mtime_ns
    outcome = program("train", *TINY, *TINY_TRAIN, *at(copied))
    assert outcome.status == 0
    assert "Already trained" in outcome.stdout
    assert checkpoint(copied).stat().st_mtime_ns == before


def test_scores_on_other_validation_pictures_are_not_told(program, copied: Path) -> None:
    (picture,) = copied.glob("data/shapes/seed0-*[0-9a-f]/JPEGImages/val_00000.jpg")
    os.utime(picture, ns=(1, 1))
    outcome = program("train", *TINY, *TINY_TRAIN, *at(copied, "again"))
    assert outcome.status == 0
    assert "Other validation pictures" in outcome.stdout
    assert set(metrics(copied, "again")) == {"train/loss"}


def test_infer_writes_everything_and_scores_it(program, copied: Path) -> None:
    outcome = program("infer", *TINY, *TINY_INFER, *at(copied))
    assert outcome.status == 0, outcome.stderr
    run = copied / "run"
    ids = {f"{split}_{i:05d}" for split, n in (("train", 16), ("val", 8)) for i in range(n)}
    assert {path.stem for path in (run / "maps").iterdir()} == ids
    assert {path.stem for path in (run / "masks").iterdir()} == ids

    (tree,) = copied.glob("data/shapes/seed0-*[0-9a-f]")
    for image_id in ids:
        picture = Image.open(tree / "JPEGImages" / f"{image_id}.jpg")
        with np.load(run / "maps" / f"{image_id}.npz", allow_pickle=False) as seed:
            assert seed["keys"].dtype == np.int64
            assert seed["maps"].dtype == np.float16
            assert tuple(seed["size"]) == picture.size[::-1]
            height, width = ((side - 1) // 4 + 1 for side in seed["size"])
            assert seed["maps"].shape == (len(seed["keys"]), height, width)
            values = {0, *(seed["keys"] + 1)}
        mask = Image.open(run / "masks" / f"{image_id}.png")
        assert mask.mode == "P"
        assert mask.size == picture.size
        assert set(np.unique(np.asarray(mask))) <= values

    values = metrics(copied, "run")
    assert all(0 <= value <= 1 for value in values.values())
    for split in ("train", "val"):
        for stage in ("cam", "lpcam", "lpcam_class"):
            found = {key.split("/", 2)[2] for key in values if key.startswith(f"{split}/{stage}/")}
            assert found >= {
                "miou", "best_threshold", "miou_at_threshold", "precision", "recall", "fp", "fn",
                "threshold_width", "iou/background", "iou/ringhead",
            }  # fmt: skip
    prototypes = Prototypes.load(run / "prototypes.safetensors")
    assert prototypes.classes == ("ringhead", "stripehead", "spothead", "checkhead")
    assert all(len(vectors) for vectors in prototypes.foreground)
    for name in ("config.yaml", "report.html", "DONE.json", "figures/gallery.png"):
        assert (run / name).stat().st_size > 100
    assert "LPCAM" in outcome.stdout


def test_what_changes_nothing_changes_nothing(program, copied: Path) -> None:
    """Batch size, worker processes and the order of scales leave every score as it is."""
    program("infer", *TINY, *TINY_INFER, *at(copied, "first"))
    shutil.rmtree(copied / "store" / "maps")
    changed = ("inference.batch_size=5", "num_workers=2", "inference.scales=[1.0,0.5]")
    program("infer", *TINY, *TINY_INFER, *changed, *at(copied, "second"))
    first, second = metrics(copied, "first"), metrics(copied, "second")
    assert first.keys() == second.keys()
    assert first == pytest.approx(second, abs=2e-3)


def test_a_second_run_reuses_every_stage(program, copied: Path) -> None:
    program("infer", *TINY, *TINY_INFER, *at(copied, "first"))
    stages = sorted(copied.glob("store/*/*/manifest.json"))
    times = [path.stat().st_mtime_ns for path in stages]
    program("infer", *TINY, *TINY_INFER, *at(copied, "second"))
    assert sorted(copied.glob("store/*/*/manifest.json")) == stages
    assert [path.stat().st_mtime_ns for path in stages] == times
    assert metrics(copied, "first") == metrics(copied, "second")


def test_a_threshold_repeats_neither_features_nor_clustering(program, copied: Path) -> None:
    program("infer", *TINY, *TINY_INFER, *at(copied, "first"))
    before = {path for name in ("features", "centers") for path in copied.glob(f"store/{name}/*")}
    program("infer", *TINY, *TINY_INFER, "thresholds.class_score=0.3", *at(copied, "second"))
    after = {path for name in ("features", "centers") for path in copied.glob(f"store/{name}/*")}
    assert before == after


@pytest.mark.parametrize("use", ["class", "context"])
def test_one_kind_of_prototype_alone(program, copied: Path, use: str) -> None:
    outcome = program("infer", *TINY, *TINY_INFER, f"prototypes.use={use}", *at(copied))
    assert outcome.status == 0, outcome.stderr
    maps = [np.load(path)["maps"] for path in (copied / "run" / "maps").glob("val*")]
    assert all(float(one.max()) > 0.9 for picture in maps for one in picture)


@pytest.mark.parametrize(
    "options",
    [
        ["refiner=par", "refiner.source=cam"],
        ["refiner=irn", "refiner.epochs=1", "refiner.crop=96"],
        ["refiner=psa", "refiner.epochs=1", "refiner.crop=96"],
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_a_refiner_makes_scores_and_the_masks(program, copied: Path, options: list[str]) -> None:
    outcome = program("infer", *TINY, *TINY_INFER, *options, "report=false", *at(copied))
    assert outcome.status == 0, outcome.stderr
    values = metrics(copied, "run")
    assert {f"{split}/refined/miou" for split in ("train", "val")} <= values.keys()
    stages = map(unpacked, copied.glob("store/refined/*/"))
    (stored,) = (found["val_00000.npz"] for found in stages if "val_00000.npz" in found)
    assert stored == (copied / "run" / "refined" / "val_00000.npz").read_bytes()
    with np.load(copied / "run" / "maps" / "val_00000.npz") as seed:
        assert seed["maps"].shape[1:] == tuple((side - 1) // 4 + 1 for side in seed["size"])
    assert len(list((copied / "run" / "masks").iterdir())) == 24


def test_masks_leave_unsure_pixels_open(program, copied: Path) -> None:
    program("infer", *TINY, *TINY_INFER, "report=false", *at(copied, "sure"))
    band = "thresholds.unsure_band=0.1"
    program("infer", *TINY, *TINY_INFER, band, "report=false", *at(copied, "unsure"))
    opened = 0
    for path in (copied / "sure" / "masks").iterdir():
        sure, other = (
            np.array(Image.open(copied / run / "masks" / path.name)) for run in ("sure", "unsure")
        )
        open_ = other == 255
        assert (sure[~open_] == other[~open_]).all()
        opened += open_.sum()
    assert opened > 100
    assert metrics(copied, "sure") == metrics(copied, "unsure")


def test_a_refiner_that_lacks_its_files_says_so(program, copied: Path) -> None:
    missing = ["refiner=sam", f"refiner.folder={copied / 'nowhere'}"]
    outcome = program("infer", *TINY, *TINY_INFER, *missing, *at(copied))
    assert_one_line(outcome, "nowhere")


def test_the_best_recipe_is_made_alike_from_pictures_and_from_kept_features(
    program, copied: Path
) -> None:
    run = (*TINY, *TINY_INFER, "report=false", "recipe=best")
    assert program("infer", *run, *at(copied, "first")).status == 0
    found = json.loads((copied / "first" / "metrics.json").read_text())
    assert {"val/cam/miou", "val/lpcam/miou", "val/lpcam_plain/miou"} <= found.keys()
    assert found["val/lpcam/miou"] != found["val/lpcam_plain/miou"]
    assert found["val/lpcam/threshold"] == found["val/lpcam_plain/threshold"]
    assert any("val_00001.npz" in unpacked(stage) for stage in copied.glob("store/finer/*/"))
    first = {path.name: path.read_bytes() for path in copied.glob("first/maps/*.npz")}
    shutil.rmtree(copied / "store" / "maps")
    assert program("infer", *run, *at(copied, "again")).status == 0
    assert first == {path.name: path.read_bytes() for path in copied.glob("again/maps/*.npz")}


def test_maps_are_scored_as_localisation_if_wanted(program, copied: Path) -> None:
    assert program("infer", *TINY, *TINY_INFER, *at(copied)).status == 0
    plain = metrics(copied, "run")
    assert (
        program("infer", *TINY, *TINY_INFER, *at(copied, "more"), "localisation=true").status == 0
    )
    more = metrics(copied, "more")
    names = {
        f"{split}/{name}/{metric}"
        for split in ("train", "val")
        for name in ("cam", "lpcam", "lpcam_class")
        for metric in ("max_box_acc_v2", "pxap")
    }
    assert more.keys() - plain.keys() == names
    assert all(0 < more[name] <= 1 for name in names)
    assert all(more[name] == plain[name] for name in plain)


def test_a_background_score_is_chosen_without_masks(program, copied: Path) -> None:
    run = (*TINY, *TINY_INFER, "report=false", "thresholds.seed_background=auto")
    assert program("infer", *run, "refiner=par", *at(copied, "chosen")).status == 0
    found = json.loads((copied / "chosen" / "metrics.json").read_text())
    train = {name: found[f"train/{name}/threshold"] for name in ("cam", "lpcam", "refined")}
    assert all(0 < value < 1 for value in train.values())
    assert train["refined"] == train["lpcam"] == found["val/lpcam/threshold"]
    given = (*TINY, *TINY_INFER, "report=false", f"thresholds.seed_background={train['lpcam']}")
    assert program("infer", *given, "refiner=par", *at(copied, "given")).status == 0
    for name in ("train_00000.png", "val_00001.png"):
        masks = [(copied / run / "masks" / name).read_bytes() for run in ("chosen", "given")]
        assert masks[0] == masks[1]


def test_a_finished_run_is_not_repeated(program, copied: Path) -> None:
    run = (*TINY, *TINY_INFER, "report=false", *at(copied))
    assert "Already done" not in program("infer", *run).stdout
    assert "Already done" in program("infer", *run).stdout
    assert "Already done" not in program("infer", *run, "thresholds.seed_background=0.3").stdout


def test_killed_training_goes_on_from_its_checkpoint(program, tmp_path: Path) -> None:
    long = ("classifier.epochs=200", "classifier.validate_every=2", "classifier.batch_size=8")
    command = [sys.executable, "train.py", *TINY, *long, *at(tmp_path, "killed")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 200
        while not (found := list(tmp_path.glob("store/classifier/*.partial/last.ckpt"))):
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    reached = torch.load(found[0], weights_only=True)["epoch"]
    assert 1 <= reached < 199

    outcome = program("train", *TINY, *long, "logger=csv", *at(tmp_path, "resumed"))
    assert outcome.status == 0, outcome.stderr
    with (tmp_path / "resumed" / "csv" / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row["val/map"]]
    assert epochs == list(range(reached + 2, 200, 2))
    assert torch.load(checkpoint(tmp_path), weights_only=True)["epoch"] == 200


def test_a_failing_training_in_a_sweep_ends_with_status_1(program, tmp_path: Path) -> None:
    wrong = ("classifier.optimizer=nonsense,sgd", "classifier.epochs=1")
    folders = (f"paths.root={tmp_path}", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    outcome = program("train", "-m", *TINY, *wrong, *folders)
    assert outcome.status == 1
    assert "classifier.optimizer=nonsense" in outcome.stderr
    assert len(list((tmp_path / "sweep").glob("*/FAILED.txt"))) == 1
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1  # the other went on


def test_infer_says_which_command_trains(program, copied: Path) -> None:
    precision = "trainer.precision=bf16-mixed"
    outcome = program("infer", *TINY, *TINY_INFER, "seed=7", precision, *at(copied))
    assert_one_line(outcome, "no classifier for these settings; train it first:  python train.py")
    assert f"seed=7 {precision}" in outcome.stderr
    assert "prototypes.k" not in outcome.stderr


def test_the_command_that_trains_leaves_out_studies_that_sweep(program, copied: Path) -> None:
    study = ("experiments=sweep_k", *TINY, *TINY_INFER, "prototypes.k=2,3", "seed=7")
    folders = (f"paths.root={copied}", f"hydra.sweep.dir={copied / 'sweep'}")
    outcome = program("infer", *study, *folders)
    assert outcome.status == 1
    assert "train it first:  python train.py" in outcome.stderr
    assert "seed=7" in outcome.stderr
    assert "experiments" not in outcome.stderr


def assert_one_line(outcome, *parts: str) -> None:
    assert outcome.status == 1
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["prototypes.kk=3"], ["prototypes.kk"]),
        (["dataset=nonsense"], ["dataset", "nonsense"]),
        (["prototypes.k=100000"], ["k=100000", "lower k"]),
        (["prototypes.k=0"], ["prototypes.k=0: should be greater than or equal to 1"]),
        (["prototypes.k=two"], ["prototypes.k='two': should be a valid integer"]),
        (["prototypes.split=both"], ["prototypes.split='both'", "'single_view' or 'multi_scale'"]),
        (["prototypes.images_per_class=0"], ["prototypes.images_per_class=0: should be"]),
        (["thresholds.activation=1.1"], ["thresholds.activation=1.1: should be less than"]),
        (["thresholds.context_floor=low"], ["thresholds.context_floor='low': should be"]),
        (["inference.scales=[1.0,-1]"], ["inference.scales[1]=-1: should be greater than 0"]),
        (["inference.flip=3"], ["inference.flip=3: should be a valid boolean"]),
        (["classifier.epochs=0"], ["classifier.epochs=0: should be greater than or equal to 1"]),
        (["classifier._target_=lpcam.models.nonsense.X"], ["lpcam.models.nonsense.X"]),
        (["classifier._target_=torch.nn.Linear"], ["torch.nn.Linear", "refused"]),
        (
            ["prototypes.use=neither"],
            ["prototypes.use='neither': should be 'both', 'class' or 'context'"],
        ),
        (["backbone.name=nonsense"], ["backbone.name=nonsense"]),
        (["ckpt=missing.ckpt"], ["missing.ckpt"]),
        (["dataset.train_split=nonsense"], ["no split 'nonsense'; choose from train, val"]),
        (["trainer._target_=os.system"], ["os.system", "refused"]),
        (["trainer._target_=lpcam.storage.store.shutil.rmtree"], ["rmtree", "refused"]),
        (["dataset._target_=lpcam.data.nonsense.X"], ["lpcam.data.nonsense.X"]),
    ],
)
def test_bad_settings_end_with_one_line(program, copied: Path, overrides, parts) -> None:
    assert_one_line(program("infer", *TINY, *TINY_INFER, *overrides, *at(copied)), *parts)


def test_a_checkpoint_of_another_class_count(program, copied: Path) -> None:
    state = torch.load(checkpoint(copied), weights_only=True)
    state["state_dict"]["head.weight"] = state["state_dict"]["head.weight"][:3].clone()
    torch.save(state, copied / "three.ckpt")
    outcome = program("infer", *TINY, *TINY_INFER, f"ckpt={copied / 'three.ckpt'}", *at(copied))
    assert_one_line(outcome, "three.ckpt", "3 classes", "has 4")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (self.path, 0o700)


def test_a_checkpoint_of_pickled_objects_is_never_unpickled(program, copied: Path) -> None:
    torch.save({"state_dict": Bomb(str(copied / "exploded"))}, copied / "bomb.ckpt")
    outcome = program("infer", *TINY, *TINY_INFER, f"ckpt={copied / 'bomb.ckpt'}", *at(copied))
    assert_one_line(outcome, "bomb.ckpt")
    assert not (copied / "exploded").exists()


def user_tree(copied: Path) -> tuple[Path, list[str]]:
    """The generated tree as a user's own VOC folder, which nobody repairs."""
    (tree,) = copied.glob("data/shapes/seed0-*[0-9a-f]")
    shutil.copytree(tree, copied / "mine")
    return copied / "mine", [
        *(o for o in TINY if not o.startswith("dataset")),
        *TINY_INFER,
        "dataset=voc",
        f"dataset.root={copied / 'mine'}",
        "+dataset.classes=[ringhead,stripehead,spothead,checkhead]",
        "dataset.train_split=train",
        "dataset.prototype_split=train",
        "dataset.map_splits=[val]",
        f"ckpt={checkpoint(copied)}",
        *at(copied),
    ]


def test_an_unreadable_picture_is_named(program, copied: Path) -> None:
    tree, overrides = user_tree(copied)
    path = tree / "JPEGImages" / "val_00003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert_one_line(program("infer", *overrides), "val_00003.jpg", "not a readable image")


def test_a_mask_of_another_size_is_named(program, copied: Path) -> None:
    tree, overrides = user_tree(copied)
    path = tree / "SegmentationClass" / "val_00002.png"
    Image.open(path).resize((33, 21)).save(path)
    assert_one_line(program("infer", *overrides), "val_00002.png", "33x21")


def test_an_empty_split_is_named(program, copied: Path) -> None:
    tree, overrides = user_tree(copied)
    (tree / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    assert_one_line(program("infer", *overrides), "val.txt", "empty")


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_loggers_keep_the_metrics(program, copied: Path, logger: str, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(copied / "no-netrc"))
    outcome = program("infer", *TINY, *TINY_INFER, f"logger={logger}", *at(copied))
    assert outcome.status == 0, outcome.stderr
    folder = copied / "run" / logger
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 500
    if logger == "csv":
        header = (folder / "metrics.csv").read_text().splitlines()[0]
        assert "val/lpcam/miou" in header
    if logger == "wandb":
        assert re.search(r"wandb sync \S+", outcome.stdout)


def test_help_answers_without_heavy_imports() -> None:
    """Neither --help nor a typo waits for torch."""
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help'];\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'timm', 'pytorch_lightning', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cutouts" in done.stdout


IRN = ("refiner=irn", "refiner.epochs=1", "refiner.crop=96", "instances=true")


def test_instances_are_found_and_scored_if_wanted(program, copied: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs the extra 'coco'")
    (tree,) = copied.glob("data/shapes/seed0-*[0-9a-f]")
    (tree / "SegmentationObject").mkdir()
    for path in (tree / "SegmentationClass").glob("val_*.png"):  # no two touch in one class
        parts, _ = ndimage.label(np.asarray(Image.open(path)))
        Image.fromarray(parts.astype(np.uint8)).save(tree / "SegmentationObject" / path.name)
    run = (*TINY, *TINY_INFER, *IRN)
    outcome = program("infer", *run, *at(copied))
    assert outcome.status == 0, outcome.stderr
    found = metrics(copied, "run")
    kinds = [f"{kind}_{metric}" for kind in ("box", "mask") for metric in ("ap", "ap50", "ap75")]
    for name in ("instances", "components"):
        scored = {key.removeprefix(f"val/{name}/") for key in found if f"val/{name}/" in key}
        assert scored == set(kinds)
        assert f"train/{name}/box_ap" in found
        assert f"train/{name}/mask_ap" not in found

    results = json.loads((copied / "run" / "instances_val.json").read_text())
    assert all(0 < entry["score"] <= 1 for entry in results)
    order = [(entry["image_id"], -entry["score"]) for entry in results]
    assert order == sorted(order)
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": name, "height": 1, "width": 1} for name in {i for i, _ in order}],
        "categories": [{"id": category} for category in range(1, 5)],
        "annotations": [],
    }
    truth.createIndex()
    read = truth.loadRes(results)
    for entry in read.dataset["annotations"]:
        mask = read.annToMask(entry)
        rows, columns = np.nonzero(mask)
        left, top, width, height = entry["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)

    assert "instances of val_00001" in (copied / "run" / "report.html").read_text()
    before = (copied / "run" / "instances_val.json").read_bytes()
    assert "Already done" in program("infer", *run, *at(copied)).stdout
    (copied / "run" / "instances_val.json").unlink()
    shutil.rmtree(copied / "store" / "instances")
    assert "Already done" not in program("infer", *run, *at(copied)).stdout
    assert (copied / "run" / "instances_val.json").read_bytes() == before


def test_instances_need_what_irn_learns(program, copied: Path) -> None:
    run = (*TINY, *TINY_INFER, "instances=true", *at(copied))
    for options in (["refiner=par"], []):
        outcome = program("infer", *run, *options)
        assert outcome.status == 1
        assert outcome.stderr.splitlines()[-1].endswith(
            "instances=true: needs displacements, which only IRN learns; add refiner=irn"
        )
