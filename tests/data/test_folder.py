from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lpcam.data.folder import Folder
from lpcam.errors import InputError
from tests.data.trees import Sample, write_folder, write_mask

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "folder.yaml"
CLASSES = ["leaf", "stem", "root"]


@pytest.fixture
def tree(tmp_path):
    samples = [
        Sample("both", Image.new("RGB", (9, 5)), [("root", (0, 0, 4, 4)), ("leaf", (2, 2, 9, 5))]),
        Sample("dot", Image.new("L", (1, 7)), [("stem", (0, 6, 1, 7))]),
        Sample("bare", Image.new("CMYK", (300, 2))),
    ]
    return write_folder(tmp_path / "mine", {"train": samples[:2], "val": samples[2:]}, CLASSES)


def refusal(tree, split="train"):
    with pytest.raises(InputError) as caught:
        Folder(tree).pictures(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_labels(tree, *rows):
    (tree / "labels.csv").write_text("\n".join(["id,split,labels", *rows]))


def test_labels_masks_and_order_are_exact(tree):
    folder = Folder(tree)
    assert folder.classes == tuple(CLASSES)
    both, dot = folder.pictures("train")
    (bare,) = folder.pictures("val")
    assert [(p.id, p.labels) for p in (both, dot, bare)] == [
        ("both", (0, 2)), ("dot", (1,)), ("bare", ())
    ]  # fmt: skip
    expected = np.zeros((5, 9), np.uint8)
    expected[:4, :4] = 3
    expected[2:, 2:] = 1
    np.testing.assert_array_equal(folder.mask(both), expected)
    np.testing.assert_array_equal(folder.mask(dot)[:, 0], [0, 0, 0, 0, 0, 0, 2])
    assert folder.mask(bare).shape == (2, 300)


def test_labels_come_from_the_table_and_never_from_the_mask(tree):
    write_mask(tree / "masks" / "dot.png", np.full((7, 1), 3, np.uint8))
    assert Folder(tree).pictures("train")[1].labels == (1,)


def test_masks_are_optional_one_by_one_or_all(tree):
    (tree / "masks" / "dot.png").unlink()
    folder = Folder(tree)
    both, dot = folder.pictures("train")
    assert folder.mask(both).shape == (5, 9)
    assert folder.mask(dot) is None
    (tree / "masks").rename(tree / "elsewhere")
    folder = Folder(tree)
    assert [folder.mask(picture) for picture in folder.pictures("train")] == [None, None]


@pytest.mark.parametrize("number", [2, 254])
def test_there_may_be_2_to_254_classes(tmp_path, number):
    classes = [f"c{i}" for i in range(number)]
    sample = Sample("a", Image.new("RGB", (3, 3)), [(classes[-1], (1, 1, 2, 2))])
    folder = Folder(write_folder(tmp_path / "mine", {"train": [sample]}, classes))
    (picture,) = folder.pictures("train")
    assert picture.labels == (number - 1,)
    assert folder.mask(picture)[1, 1] == number


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png"])
def test_pictures_may_have_any_of_the_suffixes(tree, suffix):
    (tree / "images" / "dot.jpg").rename(tree / "images" / f"dot{suffix}")
    assert Folder(tree).pictures("train")[1].path == tree / "images" / f"dot{suffix}"


def test_two_files_of_one_id_are_refused(tree):
    Image.new("RGB", (3, 3)).save(tree / "images" / "dot.png")
    assert "dot.jpg and dot.png have one id; rename or remove one" in refusal(tree)


def test_files_that_nobody_lists_do_not_matter(tree):
    (tree / "images" / "notes.txt").write_text("")
    (tree / "images" / "spare.jpg").write_bytes(b"")
    assert len(Folder(tree).pictures("train")) == 2


@pytest.mark.parametrize(
    "text",
    [
        '"id","split","labels"\n"both","train","leaf root"\n"dot","train","stem"\n',
        "\ufeffid,split,labels\r\nboth,train,root leaf\r\n\r\ndot,train,stem\r\n",
        " id , split , labels \n both , train , leaf  root leaf \n dot,train, stem",
    ],
)
def test_tables_as_spreadsheets_write_them_are_read(tree, text):
    (tree / "labels.csv").write_text(text, encoding="utf-8")
    pictures = Folder(tree).pictures("train")
    assert [(p.id, p.labels) for p in pictures] == [("both", (0, 2)), ("dot", (1,))]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("dot,train", "2 columns; give id, split, labels"),
        ("dot,train,stem,leaf", "4 columns; give id, split, labels"),
        ("dot,test,stem", "split 'test'; choose from train, val"),
        ("dot,,stem", "split ''; choose from train, val"),
        ("dot,train,stem bark", "unknown class 'bark'; known: leaf, stem, root"),
        ("dot,train,Stem", "unknown class 'Stem'"),
        ("both,val,stem", "both is listed already"),
        ("both,train,stem", "both is listed already"),
        ("../dot,train,stem", "'../dot' cannot name a file"),
        ("my picture,train,stem", "'my picture' cannot name a file"),
        (",train,stem", "'' cannot name a file"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tree, row, problem):
    set_labels(tree, "both,train,leaf", "", row, "bare,val,")
    message = refusal(tree)
    assert message.startswith(f"{tree / 'labels.csv'} line 4: ")
    assert problem in message


def test_a_stray_quote_is_named_by_its_line(tree):
    set_labels(tree, "both,train,leaf", 'dot,train,"stem"x')
    assert "labels.csv line 3: " in refusal(tree)
    set_labels(tree, 'both,train,"leaf', "dot,train,stem")
    assert "labels.csv line 3: unexpected end of data" in refusal(tree)


@pytest.mark.parametrize("header", ["", "id;split;labels", "id,labels,split", "both,train,leaf"])
def test_another_header_is_refused(tree, header):
    (tree / "labels.csv").write_text(f"{header}\nboth,train,leaf\n")
    assert f"labels.csv line 1: {header!r}; it must be 'id,split,labels'" in refusal(tree)


def test_an_empty_table_is_refused(tree):
    (tree / "labels.csv").write_text("")
    assert "labels.csv line 1: ''; it must be" in refusal(tree)


def test_an_empty_split_is_refused(tree):
    set_labels(tree, "both,train,leaf")
    assert "no picture is in val; put some in" in refusal(tree, "val")
    assert "no split 'trainval'; choose from train, val" in refusal(tree, "trainval")


def test_missing_pictures_are_counted_and_named(tree):
    set_labels(tree, "both,train,leaf", *(f"p{i},train,stem" for i in range(5)))
    assert "images lacks 5 of 6 files (p0.jpg, p1.jpg, p2.jpg, 2 more)" in refusal(tree)
    (tree / "images").rename(tree / "elsewhere")
    assert "images lacks 6 of 6 files" in refusal(tree)


def test_missing_tables_are_named(tree):
    (tree / "labels.csv").unlink()
    assert "write one with the header id,split,labels" in refusal(tree)
    (tree / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"classes\.txt.*dataset\.root must be the folder"):
        Folder(tree)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 classes; give 2 to 254"),
        ("\n\n", "0 classes; give 2 to 254"),
        ("leaf\n", "1 classes; give 2 to 254"),
        ("\n".join(f"c{i}" for i in range(255)), "255 classes; give 2 to 254"),
        ("leaf\nred leaf\n", "line 2: 'red leaf'; a class needs a name without spaces"),
        ("leaf\n\nstem\n", "line 2: ''; a class needs a name"),
        ("leaf\nstem\nleaf\n", "line 3: leaf is listed already"),
    ],
)
def test_classes_that_cannot_be_are_refused(tree, text, problem):
    (tree / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=r"classes\.txt") as caught:
        Folder(tree)
    assert problem in str(caught.value)


def test_a_table_that_is_no_text_is_refused(tree):
    (tree / "labels.csv").write_bytes(b"id,split,labels\n\xff\xfe")
    assert "labels.csv: not a readable text file" in refusal(tree)


def test_the_config_says_what_the_code_does(tree):
    config = OmegaConf.load(CONF)
    config.root = str(tree)
    folder = instantiate(config, _convert_="all")
    folder.prepare()
    assert folder.used_splits == ("train", "val")
    assert folder.map_splits == ("train", "val")
