"""The true masks of single objects, of VOC's and COCO's trees."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.coco import COCO
from lpcam.data.voc import VOC
from lpcam.errors import InputError
from tests.data.trees import Sample, rectangle, run_lengths, write_instances, write_mask, write_voc

NAMES = ("cat", "dog", "fox")
SIZE = (31, 47)
OBJECTS = [("cat", (2, 3, 12, 14)), ("dog", (20, 3, 30, 14)), ("cat", (12, 3, 20, 14))]


def voc(root: Path, **options: object) -> VOC:
    sample = Sample("a", Image.new("RGB", SIZE[::-1]), OBJECTS)
    write_voc(root, {"train": [sample], "val": [sample]}, NAMES)
    return VOC(root, tree_classes=NAMES, **options)


def painted(*values: tuple[int, tuple[int, int, int, int]]) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    for value, (left, top, right, bottom) in values:
        mask[top:bottom, left:right] = value
    return mask


def test_objects_of_voc_have_the_class_below_them(tmp_path: Path) -> None:
    tree = voc(tmp_path)
    (picture,) = tree.pictures("train")
    assert tree.instances(picture) is None
    numbers = [(n, box) for n, (_, box) in enumerate(OBJECTS, 1)]
    edge = (255, (11, 3, 13, 14))  # between the two cats
    write_mask(tmp_path / "SegmentationObject" / "a.png", painted(*numbers, edge))
    found = tree.instances(picture)
    assert found is not None
    assert found.labels == [0, 1, 0]
    assert found.crowds == [False] * 3
    np.testing.assert_array_equal(found.masks[0], painted((1, (2, 3, 11, 14))))
    np.testing.assert_array_equal(found.unknown, painted((1, edge[1])))
    assert tree.coco_ids(picture) == ("a", range(1, 4))


def test_objects_of_voc_that_are_not_chosen(tmp_path: Path) -> None:
    tree = voc(tmp_path, classes=["dog", "fox"])
    (picture,) = tree.pictures("train")
    numbers = [(n, box) for n, (_, box) in enumerate(OBJECTS, 1)]
    write_mask(tmp_path / "SegmentationObject" / "a.png", painted(*numbers))
    found = tree.instances(picture)
    assert found is not None
    assert found.labels == [0]
    np.testing.assert_array_equal(found.masks[0], painted((1, OBJECTS[1][1])))


def test_objects_of_voc_of_another_size(tmp_path: Path) -> None:
    tree = voc(tmp_path)
    write_mask(tmp_path / "SegmentationObject" / "a.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(InputError, match=r"^\S+SegmentationObject/a\.png: 5x4 pixels, .*restore"):
        tree.instances(tree.pictures("train")[0])


def test_objects_of_coco_in_its_own_names(tmp_path: Path) -> None:
    pixel = painted((1, (46, 30, 47, 31)))
    crowd = painted((1, (0, 20, 40, 31)))
    annotations = [
        (2, rectangle((2, 3, 12, 14)), 0),
        (90, run_lengths(pixel), 0),
        (13, rectangle((20, 3, 30, 14)), 0),
        (2, run_lengths(crowd), 1),
    ]
    data = {
        "images": [
            {"id": 42, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]},
            {"id": 5, "file_name": "b.jpg", "height": SIZE[0], "width": SIZE[1]},
        ],
        "categories": [{"id": i, "name": n} for i, n in ((2, "cat"), (13, "dog"), (90, "fox"))],
        "annotations": [
            {
                "id": number,
                "image_id": 42,
                "category_id": category,
                "segmentation": where,
                "iscrowd": crowded,
                "bbox": [0, 0, 1, 1],
            }
            for number, (category, where, crowded) in enumerate(annotations, 1)
        ],
    }
    (tmp_path / "train2014").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "train2014" / f"{name}.jpg")
    write_instances(tmp_path, json.loads(json.dumps(data)))
    tree = COCO(tmp_path, tree_classes=NAMES, classes=["fox", "cat"])
    (picture,) = tree.pictures("train")
    found = tree.instances(picture)
    assert found.labels == [1, 0, 1]
    assert found.crowds == [False, False, True]
    np.testing.assert_array_equal(found.masks[1], pixel)
    np.testing.assert_array_equal(found.masks[2], crowd)
    assert not found.unknown.any()
    assert tree.coco_ids(picture) == (42, [90, 2])
    every = COCO(tmp_path, tree_classes=NAMES)
    assert every.instances(every.pictures("train")[1]).labels == []
