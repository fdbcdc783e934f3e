"""What all readers share: pictures and masks of odd kinds, and the look before the start."""

import numpy as np
import pytest
from PIL import Image

from lpcam.data.coco import COCO
from lpcam.data.crops import RandomCrop, by_long_side
from lpcam.data.dataset import Picture, multi_hot, open_picture
from lpcam.data.folder import Folder
from lpcam.data.loaders import train_loader, view_loader
from lpcam.data.voc import VOC
from lpcam.errors import InputError
from tests.data.trees import draw_samples, write_coco, write_folder, write_voc

CLASSES = ["cat", "dog", "fox"]


@pytest.fixture
def splits():
    return {"train": draw_samples(CLASSES, 7, 0), "val": draw_samples(CLASSES, 4, 1, prefix="v")}


def test_three_layouts_of_the_same_pictures_read_alike(tmp_path, splits):
    categories = {7: "fox", 2: "cat", 5: "dog"}  # in ascending order: cat, dog, fox
    datasets = [
        VOC(write_voc(tmp_path / "voc", splits, CLASSES), tree_classes=CLASSES),
        COCO(write_coco(tmp_path / "coco", splits, categories), tree_classes=CLASSES),
        Folder(write_folder(tmp_path / "folder", splits, CLASSES)),
    ]
    for dataset in datasets:
        dataset.prepare()
        assert dataset.classes == tuple(CLASSES)
        for split, samples in splits.items():
            pictures = dataset.pictures(split)
            assert [p.id for p in pictures] == [s.id for s in samples]
            assert [p.labels for p in pictures] == [s.labels(CLASSES) for s in samples]
            for picture, sample in zip(pictures, samples, strict=True):
                mask = dataset.mask(picture)
                np.testing.assert_array_equal(mask, sample.mask(CLASSES))
                assert mask.dtype == np.uint8
                assert open_picture(picture.path).size == sample.image.size


def test_a_mask_has_the_same_digest_until_it_changes(tmp_path, splits):
    voc = VOC(write_voc(tmp_path / "voc", splits, CLASSES), tree_classes=CLASSES)
    first, second, *_ = voc.pictures("train")
    before = voc.mask_digest(first)
    assert before == voc.mask_digest(first) != voc.mask_digest(second)
    first.mask_path.write_bytes(second.mask_path.read_bytes())
    assert voc.mask_digest(first) == voc.mask_digest(second)
    assert voc.mask_digest(Picture("a", first.path, (0,))) is None


def mask_of(path, classes=("a", "b")):
    return VOC(path.parent, tree_classes=classes).mask(Picture("x", path, (0,), path))


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_palette_and_a_greyscale_mask_hold_class_numbers(tmp_path, mode):
    values = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([9, 9, 9] * 256)  # colours mean nothing
    image.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == mode
    np.testing.assert_array_equal(mask_of(tmp_path / "mask.png"), values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_that_is_no_list_of_class_numbers_is_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=rf"mask\.png: mask of mode {mode}; save") as caught:
        mask_of(tmp_path / "mask.png")
    assert "\n" not in str(caught.value)


def test_a_mask_with_the_number_of_no_class_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 3, 255]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png: holds 3, but there are 2 classes"):
        mask_of(tmp_path / "mask.png")


def test_a_greyscale_and_a_cmyk_jpeg_become_rgb(tmp_path):
    grey = Image.new("L", (16, 8), 77)
    cmyk = Image.new("CMYK", (16, 8), (0, 255, 255, 0))  # all of magenta and yellow: red
    for name, image, colour in (("grey", grey, (77, 77, 77)), ("cmyk", cmyk, (255, 0, 0))):
        path = tmp_path / f"{name}.jpg"
        image.save(path, quality=100)
        assert Image.open(path).mode == image.mode
        pixels = np.asarray(open_picture(path), int)
        assert pixels.shape == (8, 16, 3)
        assert np.abs(pixels - colour).max() <= 3


def test_a_picture_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: picture of mode I;16; convert it to 8 bits"):
        open_picture(tmp_path / "deep.png")


def test_an_exif_rotation_is_ignored_wherever_pictures_are_read(tmp_path):
    """The tag says to turn the picture by 90 degrees; its mask is stored as its pixels are."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    assert Image.open(path).getexif()[0x0112] == 6
    assert np.abs(np.asarray(open_picture(path), int) - pixels).max() <= 3
    picture = Picture("turned", path, (0,))
    norm = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    (batch,) = view_loader([picture], 1, scales=[1.0], flip=False)
    assert tuple(batch["size"]) == (8, 16)
    assert batch["views"][0].shape == (1, 3, 8, 16)
    crop = RandomCrop(**norm, scale=by_long_side((16, 16)), crop=16)
    ((images, _),) = train_loader([picture], 1, crop, batch_size=1)
    rows = images[0, 0].sum(1) > 4  # the picture is as wide as the crop, and half as high
    assert rows.sum() == 8


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 2)])
def test_a_picture_of_a_single_row_or_column_can_be_scaled(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size).save(path)
    (batch,) = view_loader([Picture("thin", path, ())], 1, scales=[0.25, 1.0], flip=False)
    assert tuple(batch["size"]) == size[::-1]
    assert batch["views"][0].shape[2:] == tuple(max(1, round(side / 4)) for side in size[::-1])


def test_pictures_without_known_labels_are_refused_where_labels_are_needed(tmp_path):
    pictures = [Picture("a", tmp_path / "a.jpg", (1,)), Picture("b", tmp_path / "b.jpg", None)]
    np.testing.assert_array_equal(multi_hot(pictures[:1], 3), [[0, 1, 0]])
    with pytest.raises(InputError, match=r"b\.jpg: has no image labels.*use another split"):
        multi_hot(pictures, 3)


@pytest.mark.parametrize("setting", ["train_split", "val_split", "prototype_split", "map_splits"])
def test_every_split_in_use_is_looked_at_before_the_start(tmp_path, splits, setting):
    root = write_voc(tmp_path / "voc", splits, CLASSES)
    value = ["train", "nowhere"] if setting == "map_splits" else "nowhere"
    with pytest.raises(InputError, match=r"nowhere\.txt: no such split"):
        VOC(root, tree_classes=CLASSES, **{setting: value}).prepare()


def test_the_look_before_the_start_opens_no_picture(tmp_path, splits):
    root = write_voc(tmp_path / "voc", splits, CLASSES)
    for path in (*root.glob("JPEGImages/*"), *root.glob("SegmentationClass/*")):
        path.write_bytes(b"no image")
    dataset = VOC(root, tree_classes=CLASSES)
    dataset.prepare()
    picture = dataset.pictures("train")[0]
    with pytest.raises(InputError, match="not a readable image"):
        open_picture(picture.path)
    with pytest.raises(InputError, match="not a readable image"):
        dataset.mask(picture)
