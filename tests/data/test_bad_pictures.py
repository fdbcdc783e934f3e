"""Broken and odd pictures: refused by name, or read right; and what on_error=skip leaves out."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpcam.data.coco import COCO
from lpcam.data.dataset import Picture, SegmentationDataset, open_image, open_picture
from lpcam.data.folder import Folder
from lpcam.data.voc import VOC
from lpcam.errors import InputError
from tests.data.trees import draw_samples, write_coco, write_folder, write_voc

CLASSES = ["cat", "dog", "fox"]
ENCODINGS = (
    ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG"),
    ("RGBA", "PNG"), ("1", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("P", "GIF"), ("RGB", "TIFF"),
    ("RGB", "PPM"),
)  # fmt: skip
COLOURS = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)


def encoded(mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def refused(path: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_picture(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("mode", "kind"), ENCODINGS)
def test_any_encoding_under_any_name_is_read_as_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / "wrong.jpg"
    path.write_bytes(encoded(mode, kind))
    image = open_picture(path)
    assert (image.mode, image.size) == ("RGB", (31, 23))


def test_a_palette_with_transparent_colours_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).convert("P")
    expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.png")), expected)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    encoding=st.sampled_from([(mode, kind, encoded(mode, kind)) for mode, kind in ENCODINGS]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    share=st.floats(0, 1),
)
def test_any_damage_is_one_line_or_harmless(
    encoding: tuple[str, str, bytes], changes: list[tuple[int, int]], share: float
) -> None:
    data = bytearray(encoding[2])
    for place, value in changes:
        data[place % len(data)] = value
    del data[round(share * len(data)) :]
    try:
        image = open_picture(io.BytesIO(bytes(data)))
    except InputError as error:
        line = str(error)
    else:
        line = "convert it to 8 bits"
        assert image.mode == "RGB"
        assert np.asarray(image).shape == (image.height, image.width, 3)
    assert "\n" not in line
    assert "not a readable image" in line or "convert it to 8 bits" in line


def test_no_other_program_is_started_for_a_picture(tmp_path: Path) -> None:
    """Pillow would have Ghostscript run an EPS file, whatever its name."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"
    assert "not a readable image" in refused(path)


def test_a_png_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (15_000, 15_000)).save(path)
    assert path.stat().st_size < 100_000
    assert "decompression bomb" in refused(path)


def harm(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 3])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "no image":
        path.write_text("a note")
    else:
        Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path, "PNG")


def tree(kind: str, root: Path) -> tuple[Any, Path]:
    """A data set's constructor, and the folder of its training pictures."""
    train, val = draw_samples(CLASSES, 6, 0), draw_samples(CLASSES, 3, 1, prefix="v")
    splits = {"train": train, "val": val}
    if kind == "voc":
        write_voc(root, splits, CLASSES)
        return (lambda **options: VOC(root, tree_classes=CLASSES, **options)), root / "JPEGImages"
    if kind == "coco":
        write_coco(root, splits, {1: "cat", 2: "dog", 3: "fox"})
        return (lambda **options: COCO(root, tree_classes=CLASSES, **options)), root / "train2014"
    write_folder(root, splits, CLASSES)
    return (lambda **options: Folder(root, **options)), root / "images"


@pytest.mark.parametrize("kind", ["voc", "coco", "folder"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    broken=st.dictionaries(
        st.integers(0, 5), st.sampled_from(["cut", "emptied", "no image", "16 bits"]), max_size=5
    )
)
def test_what_is_broken_is_left_out_and_nothing_else(kind: str, broken: dict[int, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make, images = tree(kind, Path(folder) / kind)
        whole = make()
        whole.prepare()
        ids = [picture.id for picture in whole.pictures("train")]
        for number, how in broken.items():
            harm(images / f"{ids[number]}.jpg", how)
        stopping: SegmentationDataset = make()
        stopping.prepare()
        assert [picture.id for picture in stopping.pictures("train")] == ids

        dataset: SegmentationDataset = make(on_error="skip")
        dataset.prepare()
        left = [picture.id for picture in dataset.pictures("train")]
        assert left == [name for number, name in enumerate(ids) if number not in broken]
        assert len(dataset.pictures("val")) == 3
        found = dataset.skipped.get("train", {})
        assert found.keys() == {ids[number] for number in broken}
        assert all(f"{images / name}.jpg" in line for name, line in found.items())
        for picture in dataset.pictures("train"):
            assert dataset.look(picture)[2] == ""


def test_a_broken_mask_leaves_its_picture_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, _ = tree("folder", tmp_path / "mine")
    masks = tmp_path / "mine" / "masks"
    Image.new("RGB", (40, 40)).save(masks / "000.png")
    Image.fromarray(np.full((40, 40), 99, np.uint8)).save(masks / "001.png")
    Image.new("L", (7, 7)).save(masks / "002.png")
    dataset = make(on_error="skip")
    dataset.prepare()
    assert [p.id for p in dataset.pictures("train")] == ["003", "004", "005"]
    problems = dataset.skipped["train"]
    for name, words in (("000", "mode RGB"), ("001", "holds 99"), ("002", "mask of 7x7")):
        assert words in problems[name]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: train: 3 of 6 pictures left out: {masks / '000.png'}: mask")


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    make, images = tree("folder", tmp_path / "mine")
    for path in images.glob("v*"):
        harm(path, "cut")
    with pytest.raises(InputError, match=r"every picture of val is broken: .*v000"):
        make(on_error="skip").prepare()


def test_names_of_any_alphabet_are_read(tmp_path: Path) -> None:
    samples = draw_samples(CLASSES, 3, 0)
    names = ["Grüße", "写真", "снимок"]
    renamed = [type(s)(name, s.image, s.objects) for name, s in zip(names, samples, strict=True)]
    splits = {"train": renamed, "val": draw_samples(CLASSES, 3, 1, prefix="v")}
    dataset = Folder(write_folder(tmp_path / "mine", splits, CLASSES))
    dataset.prepare()
    assert [picture.id for picture in dataset.pictures("train")] == names
    assert all(dataset.look(picture)[2] == "" for picture in dataset.pictures("train"))


def test_a_palette_mask_of_any_colours_is_read_and_a_coloured_one_refused(tmp_path: Path) -> None:
    make, _ = tree("folder", tmp_path / "mine")
    dataset = make()
    (picture, *_) = dataset.pictures("train")
    path = picture.mask_path
    with open_image(path) as image:
        coloured = image.convert("RGB")
    assert dataset.mask(picture).max() <= 3
    coloured.save(path)
    with pytest.raises(InputError, match="mask of mode RGB"):
        dataset.mask(Picture(picture.id, picture.path, picture.labels, path))
