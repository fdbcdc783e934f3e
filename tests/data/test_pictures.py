"""Reading single files, and what a list of pictures is turned into."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Picture, fingerprint, multi_hot, open_image
from lpcam.errors import InputError


def picture(path: Path, labels: tuple[int, ...] = (0, 2)) -> Picture:
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Picture(path.stem, path, labels)


def refused(path: Path, *, decode: bool = True) -> None:
    with pytest.raises(InputError) as caught:
        open_image(path, decode=decode)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_open_image(tmp_path: Path) -> None:
    own = picture(tmp_path / "a.png")
    image = open_image(own.path)
    expected = np.random.default_rng(5).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_cut_image_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = picture(tmp_path / f"cut.{suffix}").path
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path)


@pytest.mark.parametrize("decode", [True, False])
def test_what_is_no_image_is_refused(tmp_path: Path, decode: bool) -> None:
    path = tmp_path / "note.jpg"
    path.write_text("This is a text.\nOf two lines.\n")
    refused(path, decode=decode)
    path.write_bytes(b"")
    refused(path, decode=decode)
    refused(tmp_path / "missing.jpg", decode=decode)
    (tmp_path / "folder.jpg").mkdir()
    refused(tmp_path / "folder.jpg", decode=decode)


def test_an_image_of_absurd_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ppm"
    path.write_bytes(b"P6 20000 20000 255\n")
    refused(path, decode=False)


def test_the_header_alone_tells_the_size(tmp_path: Path) -> None:
    path = picture(tmp_path / "cut.jpg").path
    path.write_bytes(path.read_bytes()[:-300])
    with open_image(path, decode=False) as image:
        assert image.size == (36, 24)
    refused(path)


def test_multi_hot(tmp_path: Path) -> None:
    pictures = [Picture("x", tmp_path, labels) for labels in ((0, 2), (), (3,), (0, 1, 2, 3))]
    found = multi_hot(pictures, 4)
    assert found.dtype == np.float32
    expected = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(found, expected)
    assert multi_hot([], 4).shape == (0, 4)


def test_fingerprint(tmp_path: Path) -> None:
    pictures = [picture(tmp_path / f"{name}.png") for name in "abc"]
    before = fingerprint(pictures)
    assert fingerprint([replace(own) for own in pictures]) == before
    first, *others = pictures
    found = {
        before,
        fingerprint(pictures[::-1]),
        fingerprint(others),
        fingerprint([replace(first, labels=(0,)), *others]),
        fingerprint([replace(first, labels=()), *others]),
        fingerprint([replace(first, id="other"), *others]),
    }
    assert len(found) == 6

    stat = first.path.stat()
    os.utime(first.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    touched = fingerprint(pictures)
    os.utime(first.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(pictures) == before
    first.path.write_bytes(first.path.read_bytes() + b"\x00")
    os.utime(first.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    grown = fingerprint(pictures)
    assert len({before, touched, grown}) == 3


def test_fingerprint_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png")
    (tmp_path / "moved").mkdir()
    moved = first.path.rename(tmp_path / "moved" / "a.png")
    before = fingerprint([replace(first, path=moved)])
    moved.rename(first.path)
    assert fingerprint([first]) == before
