from pathlib import Path

import imgviz
import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lpcam.data.dataset import open_picture
from lpcam.data.voc import CLASSES, VOC
from lpcam.errors import InputError
from tests.data.trees import Sample, draw_samples, write_annotation, write_mask, write_voc

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "voc.yaml"


def blank(name, *objects, size=(13, 7)):
    return Sample(name, Image.new("RGB", size), list(objects))


@pytest.fixture
def tree(tmp_path):
    samples = [
        blank("2007_000032", ("person", (0, 0, 5, 5)), ("aeroplane", (2, 2, 13, 7))),
        blank("dot", ("tvmonitor", (12, 6, 13, 7))),
        blank("nothing", size=(1, 3)),
    ]
    splits = {"train": samples[:2], "val": samples[2:], "trainval": samples}
    return write_voc(tmp_path / "VOC2012", splits, CLASSES)


def list_file(tree, split):
    return tree / "ImageSets" / "Segmentation" / f"{split}.txt"


def refusal(tree, split="train", **settings):
    """The one line that refuses a split."""
    with pytest.raises(InputError) as caught:
        VOC(tree, **settings).pictures(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_masks_and_order_are_exact(tree):
    voc = VOC(tree)
    pictures = voc.pictures("trainval")
    assert [(p.id, p.labels) for p in pictures] == [
        ("2007_000032", (0, 14)),
        ("dot", (19,)),
        ("nothing", ()),
    ]
    overlap, dot, nothing = (voc.mask(picture) for picture in pictures)
    expected = np.zeros((7, 13), np.uint8)
    expected[:5, :5] = 15
    expected[2:, 2:] = 1
    np.testing.assert_array_equal(overlap, expected)
    assert dot[6, 12] == 20
    assert np.count_nonzero(dot) == 1
    assert nothing.shape == (3, 1)
    assert not nothing.any()
    assert voc.pictures("train") == pictures[:2]
    assert voc.pictures("val") == pictures[2:]


def test_labels_come_from_the_annotation_and_never_from_the_mask(tree):
    write_annotation(tree / "Annotations" / "dot.xml", [("cat", False), ("bird", False)])
    write_mask(tree / "SegmentationClass" / "2007_000032.png", np.full((7, 13), 20, np.uint8))
    assert [picture.labels for picture in VOC(tree).pictures("train")] == [(0, 14), (2, 7)]


def test_difficult_objects_are_kept_or_dropped(tree):
    objects = [("cat", True), ("dog", True), ("dog", False), ("bus", False)]
    write_annotation(tree / "Annotations" / "dot.xml", objects)
    write_annotation(tree / "Annotations" / "nothing.xml", [("cow", True)])
    kept, dropped = VOC(tree), VOC(tree, difficult=False)
    assert [p.labels for p in kept.pictures("trainval")] == [(0, 14), (5, 7, 11), (9,)]
    assert [p.labels for p in dropped.pictures("trainval")] == [(0, 14), (5, 11), ()]


def test_void_pixels_stay_255(tree):
    mask = np.zeros((7, 13), np.uint8)
    mask[1:6, 1:12], mask[2:5, 2:11] = 255, 8
    write_mask(tree / "SegmentationClass" / "dot.png", mask)
    voc = VOC(tree)
    np.testing.assert_array_equal(voc.mask(voc.pictures("train")[1]), mask)


def test_a_picture_may_lack_a_mask(tree):
    (tree / "SegmentationClass" / "dot.png").unlink()
    voc = VOC(tree)
    first, second = voc.pictures("train")
    assert voc.mask(first) is not None
    assert voc.mask(second) is None


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_train_aug_takes_its_own_masks_where_there_are_any(tree, name):
    list_file(tree, name).write_text("nothing\ndot\n")
    plain = VOC(tree)
    np.testing.assert_array_equal(
        plain.mask(plain.pictures("train_aug")[1]), plain.mask(plain.pictures("train")[1])
    )
    augmented = np.full((7, 13), 3, np.uint8)
    write_mask(tree / "SegmentationClassAug" / "dot.png", augmented)
    voc = VOC(tree)
    nothing, dot = voc.pictures("train_aug")
    assert (nothing.labels, dot.labels) == ((), (19,))
    np.testing.assert_array_equal(voc.mask(dot), augmented)
    assert voc.mask(nothing).shape == (3, 1)
    # Other splits keep VOC's own masks.
    assert np.count_nonzero(voc.mask(voc.pictures("train")[1])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "dot\nnothing\n",
        "\ufeffdot\r\n\r\nnothing",
        "dot.jpg\nnothing.jpg\n",
        "/JPEGImages/dot.jpg /SegmentationClassAug/dot.png\n"
        "/JPEGImages/nothing.jpg /SegmentationClassAug/nothing.png\n",
        "../../elsewhere/dot.jpg ../x.png\nC/JPEGImages/nothing.jpg y.png\n",
    ],
)
def test_a_list_of_your_own_may_be_of_ids_or_of_pairs(tree, tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    pictures = VOC(tree, train_aug_list=path).pictures("train_aug")
    assert [picture.id for picture in pictures] == ["dot", "nothing"]
    assert {picture.path.parent for picture in pictures} == {tree / "JPEGImages"}


def test_paths_in_a_list_are_not_followed(tree, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.jpg")
    list_file(tree, "train").write_text("../../secret.jpg x.png\n")
    assert "JPEGImages lacks 1 of 1 files (secret.jpg)" in refusal(tree)


@pytest.mark.parametrize("name", ["..", "a/..", ".hidden", "a\\b", "a:b", "$(x)", "/.jpg"])
def test_what_cannot_name_a_file_is_refused_with_its_line(tree, name):
    list_file(tree, "train").write_text(f"dot\n{name}\n")
    assert "train.txt line 2: " in refusal(tree)
    assert "cannot name a file" in refusal(tree)


def test_a_picture_that_is_listed_twice_is_refused(tree):
    list_file(tree, "train").write_text("dot\n2007_000032\n\n/x/dot.jpg /y/dot.png\n")
    assert "train.txt line 4: dot is listed already in line 1; remove" in refusal(tree)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_split_is_refused(tree, text):
    list_file(tree, "val").write_text(text)
    assert "val.txt: the split is empty" in refusal(tree, "val")


def test_a_list_that_is_no_text_is_refused(tree):
    list_file(tree, "val").write_bytes(b"\xff\xfe\x00\x9f")
    assert "val.txt: not a readable text file" in refusal(tree, "val")


def test_a_split_that_is_not_there_says_what_to_do(tree, tmp_path):
    assert "dataset.root must be the folder VOC2012" in refusal(tree.parent)
    assert "dataset.train_split=train" in refusal(tree, "train_aug")
    message = refusal(tree, "train_aug", train_aug_list=tmp_path / "gone.txt")
    assert message.startswith(f"{tmp_path / 'gone.txt'}: no such split; correct dataset.train_aug_")


def test_all_that_is_missing_is_counted_and_named_at_once(tree):
    samples = [blank(f"new{number}") for number in range(6)]
    write_voc(tree.parent / "more", {"more": samples}, CLASSES)
    (tree.parent / "more" / "ImageSets" / "Segmentation" / "more.txt").rename(
        list_file(tree, "more")
    )
    for sample in samples[:5]:
        sample.image.save(tree / "JPEGImages" / f"{sample.id}.jpg")
    write_annotation(tree / "Annotations" / "new1.xml", [])
    message = refusal(tree, "more")
    assert f"{tree / 'JPEGImages'} lacks 1 of 6 files (new5.jpg)" in message
    assert "Annotations lacks 5 of 6 files (new0.xml, new2.xml, new3.xml, 2 more)" in message


def test_a_missing_folder_lacks_everything(tree):
    (tree / "Annotations").rename(tree / "Elsewhere")
    assert "Annotations lacks 2 of 2 files" in refusal(tree)


def test_an_unknown_class_is_named(tree):
    write_annotation(tree / "Annotations" / "dot.xml", [("cat", False), ("unicorn", True)])
    assert "dot.xml: unknown class 'unicorn'; known: ('aeroplane'," in refusal(tree)
    assert VOC(tree, difficult=False).pictures("train")[1].labels == (7,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation><object>",
        "nonsense",
        "<?xml version='1.0' encoding='foo'?><annotation/>",
        "<?xml version='1.0' encoding='utf-7'?><annotation/>",
    ],
)
def test_a_broken_annotation_is_named(tree, text):
    (tree / "Annotations" / "dot.xml").write_text(text)
    assert "dot.xml: not a readable annotation" in refusal(tree)


def test_test_pictures_have_neither_labels_nor_masks(tree):
    list_file(tree, "test").write_text("hidden\n")
    Image.new("RGB", (5, 4)).save(tree / "JPEGImages" / "hidden.jpg")
    voc = VOC(tree, map_splits=["train", "test"])
    (picture,) = voc.pictures("test")
    assert picture.labels is None
    assert voc.mask(picture) is None
    with pytest.raises(InputError, match=r"hidden\.jpg: has no image labels.*use another split"):
        voc.prepare()
    # A test split that has been annotated is a split like any other.
    write_annotation(tree / "Annotations" / "hidden.xml", [("cat", False)])
    assert VOC(tree).pictures("test")[0].labels == (7,)


def test_annotations_are_read_once(tree):
    voc = VOC(tree)
    pictures = voc.pictures("trainval")
    for path in (tree / "Annotations").iterdir():
        path.unlink()
    assert voc.pictures("trainval") == pictures
    assert "lacks 3 of 3" in refusal(tree, "trainval")


def test_a_genuine_voc_photo_is_read(tmp_path):
    source = Path(imgviz.__file__).parent / "data" / "voc"
    with np.load(source / "data.npz", allow_pickle=False) as file:
        numbers, regions = file["labels"], file["masks"]
    assert (source / "class_names.txt").read_text().split()[1:] == list(CLASSES)
    truth = np.zeros(regions.shape[1:], np.uint8)
    for number, region in zip(numbers, regions, strict=True):
        truth[region] = number
    objects = [(CLASSES[number - 1], (0, 0, 1, 1)) for number in numbers]
    with Image.open(source / "rgb.jpg") as photo:
        root = write_voc(tmp_path / "VOC2012", {"val": [Sample("photo", photo, objects)]}, CLASSES)
    (root / "JPEGImages" / "photo.jpg").write_bytes((source / "rgb.jpg").read_bytes())
    write_mask(root / "SegmentationClass" / "photo.png", truth)
    voc = VOC(root)
    (picture,) = voc.pictures("val")
    names = [voc.classes[label] for label in picture.labels]
    assert names == ["bottle", "chair", "diningtable", "person"]
    mask = voc.mask(picture)
    np.testing.assert_array_equal(mask, truth)
    assert set(np.unique(mask)) - {0} == {label + 1 for label in picture.labels}
    assert open_picture(picture.path).size == (500, 375) == mask.shape[::-1]


def test_a_choice_of_classes_leaves_out_pictures_and_ignores_other_objects(tmp_path, capsys):
    samples = [
        blank("both", ("person", (0, 0, 5, 5)), ("dog", (2, 2, 13, 7))),
        blank("other", ("boat", (0, 0, 5, 5))),
        blank("nothing"),
        blank("beside", ("dog", (0, 0, 5, 5)), ("boat", (2, 2, 13, 7))),
    ]
    tree = write_voc(tmp_path / "VOC2012", {"train": samples}, CLASSES)
    chosen, whole = VOC(tree, ("person", "dog")), VOC(tree)
    both, beside = chosen.pictures("train")
    assert (both.id, both.labels, beside.id, beside.labels) == ("both", (0, 1), "beside", (1,))
    assert "train.txt: 2 of 4 pictures left out" in capsys.readouterr().err
    expected = np.zeros((7, 13), np.uint8)
    expected[:5, :5] = 1
    expected[2:, 2:] = 2
    np.testing.assert_array_equal(chosen.mask(both), expected)
    expected[:5, :5] = 2
    expected[2:, 2:] = 255
    np.testing.assert_array_equal(chosen.mask(beside), expected)
    assert chosen.mask_digest(both) != whole.mask_digest(both)
    assert len(whole.pictures("train")) == 4
    with pytest.raises(InputError, match=r"train\.txt: no picture shows a class"):
        VOC(tree, ("sofa", "cow")).pictures("train")


def test_a_tree_of_classes_of_its_own_is_read_by_their_order(tmp_path):
    samples = [blank("a", ("left", (0, 0, 5, 5)), ("right", (2, 2, 13, 7)))]
    tree = write_voc(tmp_path / "own", {"train": samples}, ["left", "right"])
    plain, turned = VOC(tree, ("left", "right")), VOC(tree, ("right", "left"))
    assert plain.mask(plain.pictures("train")[0])[0, 0] == 1
    # Without VOC's names among them, the order is that of the masks.
    assert turned.tree_classes == ("right", "left")
    with pytest.raises(InputError, match="no class 'left' among aeroplane"):
        VOC(tree, ("left", "cat"))
    assert VOC(tree, ("left", "cat"), tree_classes=("cat", "left", "right")).chosen


def test_a_list_of_ones_own_makes_a_part_of_a_tree_equal_to_the_whole(tmp_path):
    samples = draw_samples(CLASSES[:3], 9, 0)
    wanted = [samples[i] for i in (5, 0, 3)]
    listed = tmp_path / "train.txt"
    listed.write_text("".join(f"{sample.id}\n" for sample in wanted))
    trees = {
        "whole": {"train": samples[::2], "val": samples[1::2], "trainval": samples},
        "part": {"train": wanted[::-1]},
    }
    found = {}
    for name, splits in trees.items():
        voc = VOC(write_voc(tmp_path / name, splits, CLASSES), CLASSES[1::-1], train_list=listed)
        pictures = voc.pictures("train")
        files = [(p.path.read_bytes(), voc.mask(p).tobytes(), voc.mask_digest(p)) for p in pictures]
        found[name] = [(p.id, p.labels) for p in pictures], files
    assert found["whole"] == found["part"]
    assert [image_id for image_id, _ in found["part"][0]] == [
        s.id for s in wanted if s.labels(CLASSES)[0] < 2
    ]


def test_the_config_says_what_the_code_does(tree):
    list_file(tree, "train_aug").write_text("dot\n")
    config = OmegaConf.load(CONF)
    config.root = str(tree)
    voc = instantiate(config, _convert_="all")
    voc.prepare()
    assert voc.classes == CLASSES
    assert voc.used_splits == ("train_aug", "val", "train")
    assert voc.map_splits == ("train_aug",)
    assert (voc.difficult, voc.lists) == (True, dict.fromkeys(["train", "val", "train_aug"]))
