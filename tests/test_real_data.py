"""The studies of VOC and COCO for a few steps on tiny trees of everything that turns up in them."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import imgviz
import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.coco import CLASSES as COCO_CLASSES
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.seeds.record import load_seed
from tests.conftest import at, unpacked
from tests.data.trees import Sample, run_lengths, write_coco, write_mask, write_voc
from tests.oracles import segmentation

FAST = (
    "backbone=timm",
    "backbone.name=test_resnet",
    "backbone.weights=null",
    "classifier.epochs=1",
    "classifier.batch_size=3",
    "classifier.long_side=[48,80]",
    "classifier.crop=64",
    "trainer=cpu",
    "logger=none",
    "num_workers=0",
)
# Random weights score nothing, and few pictures have few features.
FAST_MAPS = (
    "prototypes.k=2",
    "prototypes.allow_missing=true",
    "thresholds.class_score=0",
    "inference.keep_features=0",
    "report=false",
)


@dataclass(frozen=True)
class Tree:
    """A data set on disk; truth is what its pictures' masks should be read as."""

    root: Path
    ids: list[str]
    truth: dict[str, np.ndarray]


def odd_samples(names: tuple[str, str, str]) -> list[Sample]:
    """Pictures of odd sizes and modes with objects down to a pixel, and none at all."""
    rng = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
        return rng.integers(0, 256, (height, width, channels), np.uint8)

    first, second, third = names
    return [
        Sample("odd", Image.fromarray(noise(33, 71)), [(first, (5, 3, 60, 30))]),
        Sample("pixel", Image.fromarray(noise(47, 52)), [(second, (20, 9, 21, 10))]),
        Sample("nothing", Image.fromarray(noise(40, 40))),
        Sample("grey", Image.fromarray(noise(45, 38, 1)[..., 0]), [(third, (0, 0, 20, 45))]),
        Sample(
            "cmyk",
            Image.fromarray(noise(50, 41, 4), mode="CMYK"),
            [(first, (0, 0, 30, 20)), (second, (10, 10, 41, 50))],
        ),
        Sample("turned", Image.fromarray(noise(36, 64)), [(third, (40, 0, 64, 20))]),
    ]


def turn(path: Path) -> None:
    """Mark a picture as one to be shown turned by 90 degrees; its pixels stay."""
    with Image.open(path) as image:
        image.load()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, quality=95, exif=exif)


def voc_tree(folder: Path) -> Tree:
    source = Path(imgviz.__file__).parent / "data" / "voc"
    with np.load(source / "data.npz", allow_pickle=False) as file:
        numbers, regions = file["labels"], file["masks"]
    objects = [(VOC_CLASSES[number - 1], (0, 0, 1, 1)) for number in numbers]
    samples = odd_samples(("cat", "sofa", "bus"))
    with Image.open(source / "rgb.jpg") as photo:
        samples.append(Sample("photo", photo.copy(), objects))
    splits = {"train_aug": samples, "train": samples, "val": samples[:4]}
    root = write_voc(folder / "VOC2012", splits, VOC_CLASSES)
    (root / "JPEGImages" / "photo.jpg").write_bytes((source / "rgb.jpg").read_bytes())
    turn(root / "JPEGImages" / "turned.jpg")
    truth = {sample.id: sample.mask(VOC_CLASSES) for sample in samples}
    truth["photo"] = np.zeros(regions.shape[1:], np.uint8)
    for number, region in zip(numbers, regions, strict=True):
        truth["photo"][region] = number
    truth["odd"][[0, 2, 30]] = 255  # the border that annotators left open
    for name in ("photo", "odd"):
        write_mask(root / "SegmentationClass" / f"{name}.png", truth[name])
    return Tree(root, [sample.id for sample in samples], truth)


def coco_tree(folder: Path) -> Tree:
    samples = odd_samples(("cat", "couch", "bus"))
    # Category ids have gaps, as COCO's own have.
    categories = {index + 1 + index // 10: name for index, name in enumerate(COCO_CLASSES)}
    splits = {"train": samples, "val": samples[:4]}
    root = write_coco(folder / "coco", splits, categories)
    turn(root / "train2014" / "turned.jpg")
    path = root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    crowd = np.zeros((40, 40), np.uint8)
    crowd[5:30, 10:40] = 1
    person = next(number for number, name in categories.items() if name == "person")
    content["annotations"].append(
        {
            "id": 999,
            "image_id": 1 + [sample.id for sample in samples].index("nothing"),
            "category_id": person,
            "iscrowd": 1,
            "segmentation": run_lengths(crowd),
        }
    )
    path.write_text(json.dumps(content))
    # A crowd is background and no label, unless a setting says otherwise.
    return Tree(
        root,
        [sample.id for sample in samples],
        {sample.id: sample.mask(COCO_CLASSES) for sample in samples},
    )


@pytest.mark.parametrize(
    ("name", "make", "classes"),
    [("voc", voc_tree, VOC_CLASSES), ("coco", coco_tree, COCO_CLASSES)],
)
def test_studies(program, tmp_path: Path, name: str, make, classes) -> None:
    tree = make(tmp_path)
    study = (f"experiments={name}_lpcam", f"dataset.root={tree.root}", *FAST)
    outcome = program("train", *study, "+trainer.limit_train_batches=2", *at(tmp_path, "train"))
    assert outcome.status == 0, outcome.stderr
    outcome = program("infer", *study, *FAST_MAPS, *at(tmp_path))
    assert outcome.status == 0, outcome.stderr

    run = tmp_path / "run"
    assert {path.stem for path in (run / "maps").iterdir()} == set(tree.ids)
    counts = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)
    for image_id in tree.ids:
        truth = tree.truth[image_id]
        seed = load_seed(run / "maps" / f"{image_id}.npz")
        assert seed.size == truth.shape
        if image_id == "nothing":
            assert not len(seed.keys)
        elif image_id != "photo":
            assert set(seed.keys + 1) == set(np.unique(truth)) - {0, 255}
        assert {float(one.max()) for one in seed.maps} <= {0.0, 1.0}  # a map may be empty
        mask = np.zeros(seed.size, np.uint8)
        if len(seed.keys):
            full = seed.full_size().numpy()
            mask = np.where(full.max(0) > 0.3, seed.keys[full.argmax(0)] + 1, 0)
        np.testing.assert_array_equal(Image.open(run / "masks" / f"{image_id}.png"), mask)
        np.add.at(counts, (truth[truth < 255], mask[truth < 255]), 1)
    metrics = json.loads((run / "metrics.json").read_text())
    expected = segmentation.scores(counts)["miou"]
    assert metrics["train/lpcam/miou_at_threshold"] == pytest.approx(expected, abs=1e-9)


def test_pictures_per_class(program, tmp_path: Path) -> None:
    """Only the features of chosen pictures are computed; maps for the split lie with them."""
    tree = coco_tree(tmp_path)
    study = ("experiments=coco_lpcam", f"dataset.root={tree.root}", *FAST)
    outcome = program("train", *study, "+trainer.limit_train_batches=1", *at(tmp_path, "train"))
    assert outcome.status == 0, outcome.stderr
    overrides = (*study, *FAST_MAPS, "inference.scales=[0.5,1]")
    for number, split in ((1, "single_view"), (100, "multi_scale")):
        settings = (f"prototypes.images_per_class={number}", f"prototypes.split={split}")
        outcome = program("infer", *overrides, *settings, *at(tmp_path, split))
        assert outcome.status == 0, outcome.stderr
    chosen = {}
    for manifest in tmp_path.glob("store/features/*/manifest.json"):
        files = unpacked(manifest.parent)
        sampled = "views" in json.loads(manifest.read_text())["inputs"]
        chosen[sampled] = {name.removesuffix(".npz") for name in files}
        with np.load(io.BytesIO(next(iter(files.values())))) as first:
            assert ("maps" in first) == sampled
    labelled = {"odd", "pixel", "grey", "cmyk", "turned"}
    assert chosen[True] == labelled  # never the picture without a label
    assert 1 <= len(chosen[False]) <= 3
    assert chosen[False] < labelled

    for override, words in (
        (
            "prototypes.split=both",
            "split='both': should be 'single_view' or 'multi_scale'",
        ),
        ("inference.scales=[0.5,2]", "takes features at scale 1"),
        ("prototypes.init=first", "prototypes.init='first': should be 'k-means++' or 'random'"),
        ("prototypes.fallback=none", "prototypes.fallback='none': should be 'best' or 'error'"),
        (
            "prototypes.images_per_class=0",
            "images_per_class=0: should be greater than or equal",
        ),
        ("prototypes.max_iter=0", "max_iter=0: should be greater than or equal to 1"),
    ):
        outcome = program("infer", *overrides, override, *at(tmp_path, "wrong"))
        assert outcome.status == 1
        assert words in outcome.stderr


def test_class_without_a_passing_prototype_stops_recipe_code(program, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tree = voc_tree(tmp_path)
    study = ("experiments=voc_lpcam", f"dataset.root={tree.root}", *FAST)
    program("train", *study, "+trainer.limit_train_batches=1", *at(tmp_path, "train"))
    overrides = (*study, *FAST_MAPS, "thresholds.class_score=0.9")
    outcome = program("infer", *overrides, *at(tmp_path))
    assert outcome.status == 1
    assert "no prototype scores above 0.9" in outcome.stderr
    assert "prototypes.fallback=best" in outcome.stderr
