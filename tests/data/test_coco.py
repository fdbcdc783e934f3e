import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as mask_codes
from pydantic import ValidationError

from lpcam.data.coco import CLASSES, COCO, _runs
from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from tests.data.trees import Sample, rectangle, run_lengths, write_coco, write_instances

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "coco.yaml"
# Out of order and with gaps, as COCO's own are; in ascending order: cat, dog, fox.
CATEGORIES = {90: "fox", 2: "cat", 13: "dog"}
NAMES = ("cat", "dog", "fox")
HEIGHT, WIDTH = 7, 12


def annotation(category, segmentation, *, number=1, crowd=0, **more):
    return {
        "id": number,
        "image_id": 1,
        "category_id": category,
        "iscrowd": crowd,
        "segmentation": segmentation,
        **more,
    }


def content(*annotations, file_name="a.jpg", height=HEIGHT, width=WIDTH):
    return {
        "images": [{"id": 1, "file_name": file_name, "height": height, "width": width}],
        "annotations": list(annotations),
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
    }


def write(root, data, *names):
    (root / "train2014").mkdir(parents=True, exist_ok=True)
    for name in names or ("a.jpg",):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "train2014" / name, "JPEG")
    return write_instances(root, data)


def read(root, *annotations, **options):
    """Labels and mask of a single picture with these annotations."""
    write(root, content(*annotations))
    coco = COCO(root, tree_classes=NAMES, **options)
    (picture,) = coco.pictures("train")
    assert picture.id == "a"
    assert picture.path == root / "train2014" / "a.jpg"
    return picture.labels, coco.mask(picture)


def refusal(root, split="train", **options):
    with pytest.raises(InputError) as caught:
        COCO(root, tree_classes=NAMES, **options).pictures(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def paint(*regions):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value, (left, top, right, bottom) in regions:
        mask[top:bottom, left:right] = value
    return mask


def test_the_names_stand_where_the_category_ids_of_coco_put_them():
    gaps = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 17: "cat", 27: "backpack"}
    known |= {44: "bottle", 62: "chair", 64: "potted plant", 72: "tv", 84: "book"}
    known |= {90: "toothbrush"}
    for category, name in known.items():
        assert CLASSES.index(name) == category - 1 - sum(gap < category for gap in gaps)
    assert len(set(CLASSES)) == 80


def test_polygons_of_every_category_give_exact_labels_and_masks(tmp_path):
    labels, mask = read(
        tmp_path,
        annotation(90, rectangle((0, 0, 3, 2))),
        annotation(2, rectangle((5, 1, 6, 2))),  # a single pixel
        annotation(13, rectangle((7, 3, 9, 7)) + rectangle((10, 0, 12, 2))),  # two parts
    )
    assert labels == (0, 1, 2)
    expected = paint((3, (0, 0, 3, 2)), (1, (5, 1, 6, 2)), (2, (7, 3, 9, 7)), (2, (10, 0, 12, 2)))
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8


def test_run_lengths_give_the_mask_they_were_made_from(tmp_path):
    by_hand = {"size": [HEIGHT, WIDTH], "counts": [9, 3, 2, 1, 69]}  # down the columns
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[[2, 3, 4], 1] = 2
    expected[0, 2] = 2
    _, mask = read(tmp_path, annotation(13, by_hand, crowd=1), crowd="foreground")
    np.testing.assert_array_equal(mask, expected)
    assert run_lengths(expected) == by_hand


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(CATEGORIES)),
            st.integers(0, WIDTH - 1),
            st.integers(0, HEIGHT - 1),
            st.integers(1, WIDTH),
            st.integers(1, HEIGHT),
            st.sampled_from(["object", "runs", "crowd"]),
        ),
        max_size=6,
    ),
    st.sampled_from(["background", "ignore", "foreground"]),
)
def test_masks_and_labels_are_those_of_painting_one_after_the_other(tmp_path, drawn, crowd):
    values = {2: 1, 13: 2, 90: 3}
    annotations, painted, labels = [], [], set()
    for number, (category, left, top, width, height, kind) in enumerate(drawn):
        box = (left, top, min(left + width, WIDTH), min(top + height, HEIGHT))
        shape = rectangle(box) if kind == "object" else run_lengths(paint((1, box)))
        # Falling ids: the order of the file decides, not that of the ids.
        item = annotation(category, shape, number=100 - number, crowd=int(kind == "crowd"))
        annotations.append(item)
        if kind == "crowd" and crowd == "background":
            continue
        labels.add(values[category] - 1)
        painted.append((255 if kind == "crowd" and crowd == "ignore" else values[category], box))
    found, mask = read(tmp_path, *annotations, crowd=crowd)
    assert found == tuple(sorted(labels))
    np.testing.assert_array_equal(mask, paint(*painted))


def test_a_later_annotation_lies_on_top(tmp_path):
    first = annotation(2, rectangle((0, 0, 6, 6)), number=9)
    second = annotation(90, rectangle((3, 3, 9, 7)), number=4)
    _, mask = read(tmp_path / "a", first, second)
    np.testing.assert_array_equal(mask, paint((1, (0, 0, 6, 6)), (3, (3, 3, 9, 7))))
    _, mask = read(tmp_path / "b", second, first)
    np.testing.assert_array_equal(mask, paint((3, (3, 3, 9, 7)), (1, (0, 0, 6, 6))))


@pytest.mark.parametrize(
    ("crowd", "labels", "value"),
    [("background", (0,), 0), ("ignore", (0, 2), 255), ("foreground", (0, 2), 3)],
)
def test_a_crowd_is_what_the_setting_says(tmp_path, crowd, labels, value):
    box = (6, 2, 11, 7)
    found, mask = read(
        tmp_path,
        annotation(2, rectangle((0, 0, 4, 4))),
        annotation(90, run_lengths(paint((1, box))), crowd=1),
        crowd=crowd,
    )
    assert found == labels
    np.testing.assert_array_equal(mask, paint((1, (0, 0, 4, 4)), (value, box)))


def test_the_settings_are_checked(tmp_path):
    with pytest.raises(ValidationError, match="should be 'background', 'ignore' or 'foreground'"):
        COCO(tmp_path, crowd="none")
    with pytest.raises(ValidationError, match="should be 'keep' or 'drop'"):
        COCO(tmp_path, unlabelled="no")
    with pytest.raises(ValidationError, match="should be 2014 or 2017"):
        COCO(tmp_path, year=2015)


@pytest.mark.parametrize(("unlabelled", "ids"), [("keep", ["a", "b", "c"]), ("drop", ["b"])])
def test_unlabelled_pictures_are_kept_or_dropped_and_counted(tmp_path, capsys, unlabelled, ids):
    data = content(annotation(2, rectangle((0, 0, 2, 2)), image_id=2))
    data["annotations"].append(annotation(2, run_lengths(paint()), crowd=1, image_id=3))
    data["images"] += [{**data["images"][0], "id": i, "file_name": f"{n}.jpg"} for i, n in
                       ((2, "b"), (3, "c"))]  # fmt: skip
    write(tmp_path, data, "a.jpg", "b.jpg", "c.jpg")
    coco = COCO(tmp_path, tree_classes=NAMES, unlabelled=unlabelled)
    pictures = coco.pictures("train")
    assert [picture.id for picture in pictures] == ids
    assert all(coco.mask(picture).any() == bool(picture.labels) for picture in pictures)
    printed = capsys.readouterr()
    assert printed.out == ""
    message = f"train2014: 3 pictures, 2 of them without labels (dataset.unlabelled={unlabelled})\n"
    assert printed.err == message


def test_dropping_every_picture_is_refused(tmp_path):
    write(tmp_path, content())
    assert "no picture has a label" in refusal(tmp_path, unlabelled="drop")
    assert len(COCO(tmp_path, tree_classes=NAMES).pictures("train")) == 1


def test_both_years_are_found(tmp_path):
    sample = Sample("000000000042", Image.new("L", (5, 3)), [("dog", (1, 1, 2, 2))])
    for year in (2014, 2017):
        write_coco(tmp_path, {"train": [sample], "val": [sample]}, CATEGORIES, year=year)
        coco = COCO(tmp_path, tree_classes=NAMES, year=year)
        coco.prepare()
        for split in ("train", "val"):
            (picture,) = coco.pictures(split)
            assert picture.path == tmp_path / f"{split}{year}" / "000000000042.jpg"
            np.testing.assert_array_equal(coco.mask(picture), sample.mask(NAMES))


def test_pictures_of_one_name_in_two_splits_keep_their_own_masks(tmp_path):
    image = Image.new("RGB", (5, 4))
    samples = {
        "train": [Sample("same", image, [("cat", (0, 0, 2, 2))])],
        "val": [Sample("same", image, [("fox", (1, 1, 5, 4))])],
    }
    coco = COCO(write_coco(tmp_path, samples, CATEGORIES), tree_classes=NAMES)
    for split, (sample,) in samples.items():
        (picture,) = coco.pictures(split)
        np.testing.assert_array_equal(coco.mask(picture), sample.mask(NAMES))
    # A picture is enough to find its mask, as after it was sent to another process.
    alone = Picture("same", tmp_path / "val2014" / "same.jpg", (2,))
    mask = COCO(tmp_path, tree_classes=NAMES).mask(alone)
    np.testing.assert_array_equal(mask, samples["val"][0].mask(NAMES))


def test_the_digest_follows_what_the_mask_depends_on(tmp_path):
    crowd = annotation(90, run_lengths(paint((1, (6, 2, 11, 7)))), crowd=1)
    cases = [
        ([annotation(2, rectangle((0, 0, 4, 4)))], "background"),
        ([annotation(2, rectangle((0, 0, 4, 5)))], "background"),
        ([annotation(13, rectangle((0, 0, 4, 4)))], "background"),
        ([annotation(2, rectangle((0, 0, 4, 4))), crowd], "ignore"),
        ([annotation(2, rectangle((0, 0, 4, 4))), crowd], "foreground"),
        ([crowd, annotation(2, rectangle((0, 0, 4, 4)))], "foreground"),
    ]
    digests = []
    for annotations, setting in cases:
        write(tmp_path, content(*annotations))
        for _ in range(2):
            coco = COCO(tmp_path, tree_classes=NAMES, crowd=setting)
            digests.append(coco.mask_digest(coco.pictures("train")[0]))
    assert digests[::2] == digests[1::2]
    assert len(set(digests)) == len(cases)


def test_the_file_is_read_once(tmp_path):
    path = write(tmp_path, content(annotation(2, rectangle((0, 0, 4, 4)))))
    coco = COCO(tmp_path, tree_classes=NAMES)
    (picture,) = coco.pictures("train")
    path.unlink()
    assert coco.pictures("train") == [picture]
    np.testing.assert_array_equal(coco.mask(picture), paint((1, (0, 0, 4, 4))))
    assert coco.mask_digest(picture)


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/a.jpg", "x/../../a.jpg", "sub/a.jpg", "..", ".a.jpg", "..\\a.jpg", ""]
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    write(tmp_path, content(file_name=name))
    (tmp_path / "a.jpg").write_bytes(b"")
    message = refusal(tmp_path)
    assert "instances_train2014.json: file_name of image 1: " in message
    assert "cannot name a file" in message


@pytest.mark.parametrize("other", [{"id": 1}, {"file_name": "a.jpg"}, {"file_name": "a.png"}])
def test_an_id_or_a_name_that_two_pictures_have_is_refused(tmp_path, other):
    data = content()
    data["images"].append({**data["images"][0], "id": 2, "file_name": "b.jpg", **other})
    write(tmp_path, data, "a.jpg", "b.jpg", "a.png")
    assert "has the id or the name of another; remove one" in refusal(tmp_path)


def test_missing_pictures_are_counted_and_named(tmp_path):
    data = content()
    data["images"] += [
        {**data["images"][0], "id": i, "file_name": f"p{i}.jpg"} for i in range(2, 8)
    ]
    write(tmp_path, data, "a.jpg", "p5.jpg")
    expected = f"{tmp_path / 'train2014'} lacks 5 of 7 files (p2.jpg, p3.jpg, p4.jpg, 2 more)"
    assert expected in refusal(tmp_path)


def test_a_missing_file_says_what_to_check(tmp_path):
    write(tmp_path, content())
    expected = "instances_val2014.json: no such split; check dataset.root, dataset.year"
    assert expected in refusal(tmp_path, "val")
    assert "instances_train2017.json: no such split" in refusal(tmp_path, year=2017)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"images": 3}', '{"images": [], "annotations": [{}]}', "\x9f"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = write(tmp_path, {})
    path.write_text(text, encoding="latin1")
    assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize("key", ["id", "file_name", "height", "width"])
def test_a_record_that_lacks_something_is_refused(tmp_path, key):
    data = content()
    del data["images"][0][key]
    write(tmp_path, data)
    assert f"not an instances file (KeyError: '{key}')" in refusal(tmp_path)


def test_a_file_without_pictures_is_refused(tmp_path):
    write(tmp_path, {**content(), "images": []})
    assert "the split is empty" in refusal(tmp_path)


def test_a_picture_without_pixels_is_refused(tmp_path):
    write(tmp_path, content(height=0))
    assert "image 1 has no pixels" in refusal(tmp_path)


def test_other_categories_than_the_classes_are_refused(tmp_path):
    write(tmp_path, content())
    with pytest.raises(InputError, match=r"3 categories \(cat, dog, fox\), not the 80 of dataset"):
        COCO(tmp_path).pictures("train")
    with pytest.raises(InputError, match=r"dataset\.tree_classes .* use COCO's own file"):
        COCO(tmp_path, tree_classes=("dog", "cat", "fox")).pictures("train")


def test_a_choice_of_classes_leaves_out_pictures_and_ignores_other_objects(tmp_path, capsys):
    box, other = (0, 0, 4, 4), (2, 2, 8, 8)
    samples = [
        Sample("both", Image.new("RGB", (9, 9)), [("fox", box), ("cat", other)]),
        Sample("other", Image.new("RGB", (9, 9)), [("dog", box)]),
        Sample("nothing", Image.new("RGB", (9, 9))),
        Sample("one", Image.new("RGB", (9, 9)), [("cat", box), ("dog", other)]),
    ]
    write_coco(tmp_path, {"train": samples}, CATEGORIES)
    coco = COCO(tmp_path, ("fox", "cat"), tree_classes=NAMES)
    both, one = coco.pictures("train")
    assert (both.id, both.labels, one.id, one.labels) == ("both", (0, 1), "one", (1,))
    assert "2 of 4 pictures left out" in capsys.readouterr().err
    expected = np.zeros((9, 9), np.uint8)
    expected[:4, :4] = 1
    expected[2:8, 2:8] = 2
    np.testing.assert_array_equal(coco.mask(both), expected)
    expected[:4, :4] = 2
    expected[2:8, 2:8] = 255
    np.testing.assert_array_equal(coco.mask(one), expected)
    whole = COCO(tmp_path, tree_classes=NAMES)
    assert coco.mask_digest(both) != whole.mask_digest(both)
    with pytest.raises(InputError, match="no class 'cow' among cat, dog, fox"):
        COCO(tmp_path, ("cat", "cow"), tree_classes=NAMES)


def test_an_annotation_of_an_unknown_category_is_refused(tmp_path):
    write(tmp_path, content(annotation(12, rectangle((0, 0, 1, 1)))))
    assert "annotations of unknown category 12" in refusal(tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        None,
        "text",
        {"size": [HEIGHT, WIDTH], "counts": []},
        {"size": [HEIGHT, WIDTH], "counts": [3]},
        {"size": [HEIGHT, WIDTH], "counts": [86, -2]},
        {"size": [HEIGHT, WIDTH], "counts": [80, 40]},
        {"size": [WIDTH, HEIGHT], "counts": [80, 4]},
        {"counts": [80, 4]},
        {"size": [HEIGHT, WIDTH], "counts": "52"},  # 7 runs of 84 pixels' code, cut short
        {"size": [HEIGHT, WIDTH], "counts": "5"},
        [[0, 0, 4, 0, float("nan"), 3]],
        [[0, 0, 1e9, 0, 4, 3]],
    ],
)
def test_an_outline_that_cannot_be_drawn_is_named(tmp_path, segmentation):
    path = write(tmp_path, content(annotation(2, segmentation, number=77)))
    coco = COCO(tmp_path, tree_classes=NAMES)
    (picture,) = coco.pictures("train")
    with pytest.raises(InputError, match="annotation 77 of a cannot be drawn") as caught:
        coco.mask(picture)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compressed_code_has_the_runs_it_was_made_of():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 90, (60, 2)):
        region = np.asfortranarray(rng.random((height, width)) < rng.random(), np.uint8)
        code = mask_codes.encode(region)["counts"].decode()
        ends = np.flatnonzero(np.diff(np.concatenate([[0], region.ravel(order="F"), [-1]])))
        assert _runs(code) == np.diff(np.concatenate([[0], ends])).tolist()


def test_a_missing_box_is_named(tmp_path):
    path = write(tmp_path, content(annotation(2, [[1, 1, 6, 1, 6, 4]], number=77)))
    coco = COCO(tmp_path, tree_classes=NAMES)
    (picture,) = coco.pictures("train")
    with pytest.raises(InputError, match="annotation 77 of a has no box") as caught:
        coco.boxes(picture)
    assert str(path) in str(caught.value)


def test_without_pycocotools_the_remedy_is_named(tmp_path, monkeypatch):
    write(tmp_path, content())
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    message = refusal(tmp_path)
    assert message.startswith("pycocotools: not installed")
    assert "pip install 'lpcam[coco]'" in message


def test_the_config_says_what_the_code_does(tmp_path):
    samples = [Sample("a", Image.new("RGB", (4, 4)), [("cat", (0, 0, 2, 2))])]
    write_coco(tmp_path, {"train": samples, "val": samples}, CATEGORIES)
    config = OmegaConf.load(CONF)
    config.root = str(tmp_path)
    assert instantiate(config, _convert_="all").classes == CLASSES
    config.tree_classes = list(NAMES)
    coco = instantiate(config, _convert_="all")
    coco.prepare()
    assert coco.used_splits == ("train", "val")
    assert coco.map_splits == ("train",)
    assert (coco.year, coco.crowd, coco.unlabelled) == (2014, "background", "keep")


def test_an_instances_file_of_the_tests_is_plain_json(tmp_path):
    path = write(tmp_path, content(annotation(2, rectangle((0, 0, 1, 1)))))
    assert json.loads(path.read_text())["annotations"][0]["segmentation"] == [
        [0, 0, 1, 0, 1, 1, 0, 1]
    ]
