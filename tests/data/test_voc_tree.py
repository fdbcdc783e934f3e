"""The writing, checking and rebuilding of generated trees, on the cheapest of them."""

import hashlib
import json
import multiprocessing
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from lpcam.data.shapes import Shapes
from lpcam.data.voc import VOC
from lpcam.errors import InputError


def shapes(root, **settings):
    return Shapes(root, **{"train": 12, "val": 6, "sizes": [48, 64], **settings})


def content(folder):
    """SHA-256 of every file by its name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    dataset = shapes(tmp_path_factory.mktemp("trees"))
    dataset.prepare()
    return dataset


def test_the_same_seed_gives_the_same_bytes_anywhere(built, tmp_path):
    again = shapes(tmp_path / "elsewhere")
    again.prepare()
    assert content(again.root) == content(built.root)


def test_seeds_and_settings_lie_side_by_side(built):
    others = [
        shapes(built.root.parent, seed=1),
        shapes(built.root.parent, jpeg_quality=90),
        shapes(built.root.parent, train=13),
    ]
    for dataset in others:
        dataset.prepare()
    trees = [content(dataset.root) for dataset in (built, *others)]
    pictures = [tree["JPEGImages/train_00000.jpg"] for tree in trees]
    assert len({dataset.root for dataset in (built, *others)}) == 4
    assert len(set(pictures[:3])) == 3
    # A picture does not depend on how many others there are.
    assert pictures[3] == pictures[0]


def test_a_plain_voc_reader_understands_the_tree(built):
    voc = VOC(built.root, tree_classes=built.classes)
    assert [len(voc.pictures(split)) for split in ("train", "val")] == [12, 6]
    assert voc.pictures("train") == built.pictures("train")


def test_labels_boxes_and_sizes_agree_with_the_masks(built):
    lone = 0
    for picture in built.pictures("train") + built.pictures("val"):
        mask = built.mask(picture)
        assert set(np.unique(mask)) - {0} == {label + 1 for label in picture.labels}
        xml = ElementTree.parse(built.root / "Annotations" / f"{picture.id}.xml")
        width, height = Image.open(picture.path).size
        assert mask.shape == (height, width)
        assert [xml.findtext(f"size/{name}") for name in ("width", "height", "depth")] == [
            str(width), str(height), "3"
        ]  # fmt: skip
        objects = xml.findall("object")
        assert len(objects) in (1, 2)
        covered = np.zeros(mask.shape, bool)
        for item in objects:
            left, top, right, bottom = (
                int(item.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")
            )
            assert 1 <= left < right <= width
            assert 1 <= top < bottom <= height
            covered[top - 1 : bottom, left - 1 : right] = True
            if len(objects) == 1:
                lone += 1
                rows, columns = np.nonzero(mask)
                assert (left, right) == (columns.min() + 1, columns.max() + 1)
                assert (top, bottom) == (rows.min() + 1, rows.max() + 1)
        assert not mask[~covered].any()
    assert lone


def test_masks_are_palette_images(built):
    with Image.open(built.pictures("val")[0].mask_path) as image:
        assert image.mode == "P"


def test_the_manifest_counts_what_is_there(built):
    manifest = json.loads((built.root / "manifest.json").read_text())
    files = {
        p.relative_to(built.root).as_posix(): p.stat().st_size
        for p in built.root.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert manifest["files"] == files
    assert manifest["settings"]["seed"] == 0
    for split, number in (("train", 12), ("val", 6)):
        names = [
            item.findtext("name")
            for index in range(number)
            for item in ElementTree.parse(
                built.root / "Annotations" / f"{split}_{index:05d}.xml"
            ).iter("object")
        ]
        assert manifest["objects"][split] == {name: names.count(name) for name in built.classes}
        assert min(manifest["objects"][split].values()) >= 1


def truncate_picture(root):
    path = root / "JPEGImages" / "train_00003.jpg"
    path.write_bytes(path.read_bytes()[:-20])


def delete_mask(root):
    (root / "SegmentationClass" / "val_00002.png").unlink()


def delete_annotations(root):
    for path in (root / "Annotations").iterdir():
        path.unlink()


def cut_manifest(root):
    path = root / "manifest.json"
    path.write_text(path.read_text()[:100])


def empty_manifest(root):
    (root / "manifest.json").write_text("[]")


def leave_half_a_build(root):
    partial = root.with_name(f"{root.name}.partial")
    root.rename(partial)
    (partial / "manifest.json").unlink()
    (partial / "JPEGImages" / "left_over.jpg").write_bytes(b"half")


@pytest.mark.parametrize(
    "damage",
    [
        truncate_picture,
        delete_mask,
        delete_annotations,
        cut_manifest,
        empty_manifest,
        leave_half_a_build,
    ],
)
def test_damage_is_noticed_and_repaired(built, tmp_path, damage):
    dataset = shapes(tmp_path)
    dataset.prepare()
    damage(dataset.root)
    assert content(dataset.root) != content(built.root)
    dataset.prepare()
    assert content(dataset.root) == content(built.root)
    assert not list(tmp_path.glob("*.partial"))


def test_a_whole_tree_is_left_alone(built):
    before = {path: path.stat().st_mtime_ns for path in built.root.rglob("*")}
    shapes(built.root.parent).prepare()
    assert {path: path.stat().st_mtime_ns for path in built.root.rglob("*")} == before


def test_two_processes_do_not_collide(built, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=shapes(tmp_path).prepare) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(shapes(tmp_path).root) == content(built.root)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed", -1),
        ("train", 0),
        ("val", 0),
        ("sizes", []),
        ("sizes", [8]),
        ("single_span", [0.8, 0.5]),
        ("single_span", [0.5, 1.5]),
        ("pair_span", [0.0, 0.5]),
        ("pair_probability", 1.5),
        ("min_visible", -0.1),
        ("context_probability", 2),
        ("jpeg_quality", 0),
        ("tilt", 100),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path, setting, value):
    with pytest.raises(ValidationError, match=rf"(?m)^{setting}\b"):
        shapes(tmp_path, **{setting: value})


def test_only_the_splits_that_are_made_can_be_named(tmp_path):
    with pytest.raises(InputError, match=r"no split 'test'; choose from train, val$"):
        shapes(tmp_path, map_splits=["train", "test"])


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*set paths\.data elsewhere"):
        shapes(tmp_path / "file" / "trees").prepare()
