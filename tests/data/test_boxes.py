"""The true boxes that each data set knows."""

from pathlib import Path

import pytest
from PIL import Image

from lpcam.data.coco import COCO
from lpcam.data.folder import Folder
from lpcam.data.voc import VOC
from lpcam.errors import InputError
from tests.data.trees import Sample, write_coco, write_folder, write_instances, write_voc

NAMES = ("cat", "dog")
PICTURE = Image.new("RGB", (20, 10))


def voc(root: Path, *objects: str, **settings: bool) -> VOC:
    """A tree of one picture with these objects."""
    write_voc(root, {"train": [Sample("a", PICTURE)]}, NAMES)
    text = f"<annotation>{''.join(objects)}</annotation>"
    (root / "Annotations" / "a.xml").write_text(text)
    return VOC(root, tree_classes=NAMES, **settings)


def voc_object(name: str, box: str, difficult: int = 0) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=False)
    bounds = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><bndbox><xmin>9</xmin></bndbox></part><bndbox>{bounds}</bndbox></object>"
    )


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    objects = (
        voc_object("dog", "1 1 20 10"),
        voc_object("dog", "3 2 4 2"),
        voc_object("cat", "5 5 6 6", difficult=1),
    )
    everything = voc(tmp_path / "all", *objects)
    (picture,) = everything.pictures("train")
    assert everything.boxes(picture) == {
        1: [(0, 0, 1, 1), (0.1, 0.1, 0.2, 0.2)],
        0: [(0.2, 0.4, 0.3, 0.6)],
    }
    easy = voc(tmp_path / "easy", *objects, difficult=False)
    assert easy.boxes(*easy.pictures("train")).keys() == {1}


def test_an_object_of_voc_without_a_box_is_refused(tmp_path: Path) -> None:
    data = voc(tmp_path, voc_object("dog", "1 1 20"))
    with pytest.raises(InputError, match=r"a\.xml: an object without a box; restore it"):
        data.boxes(*data.pictures("train"))


def test_coco_leaves_crowds_out(tmp_path: Path) -> None:
    write_coco(tmp_path, {"train": [Sample("a", PICTURE)]}, {3: "cat", 7: "dog"})
    common = {"image_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}
    annotations = [
        {"id": 1, "category_id": 7, "iscrowd": 0, "bbox": [2, 1, 10, 5], **common},
        {"id": 2, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 20, 10], **common},
    ]
    write_instances(
        tmp_path,
        {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        },
    )
    data = COCO(tmp_path, tree_classes=NAMES, crowd="foreground")
    assert data.boxes(*data.pictures("train")) == {1: [(0.1, 0.1, 0.6, 0.6)]}


def test_elsewhere_they_lie_around_the_parts_of_the_mask(tmp_path: Path) -> None:
    sample = Sample("a", PICTURE, [("cat", (0, 0, 2, 10)), ("cat", (10, 5, 20, 10))])
    write_folder(tmp_path, {"train": [sample]}, NAMES)
    data = Folder(tmp_path)
    (picture,) = data.pictures("train")
    assert data.boxes(picture) == {0: [(0, 0, 0.1, 1), (0.5, 0.5, 1, 1)]}
    assert picture.mask_path is not None
    picture.mask_path.unlink()
    assert data.boxes(*Folder(tmp_path).pictures("train")) == {}
