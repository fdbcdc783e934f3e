import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lpcam.data.crops import RandomCrop, by_long_side
from lpcam.data.dataset import Picture
from lpcam.data.loaders import (
    ViewBatch,
    decoders,
    normalized,
    pooled_loader,
    train_loader,
    view_loader,
)
from lpcam.errors import InputError

CLASSES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((40, 30), (30, 40), (40, 30), (25, 27), (40, 30), (30, 40), (40, 30), (40, 30))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Eight pictures of three sizes, mixed; grey and transparent ones among them."""
    rng = np.random.default_rng(41)
    found = []
    for index, (width, height) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mode = {2: "L", 5: "RGBA", 6: "P"}.get(index, "RGB")
        path = tmp_path / f"{index}.png"
        image.convert(mode).save(path)
        labels = tuple(c for c in range(CLASSES) if index >> c & 1)
        found.append(Picture(f"picture-{index}", path, labels))
    return found


def load(
    pictures: Sequence[Picture], batch_size: int, scales: Sequence[float] = (0.5, 1.0, 1.5)
) -> list[ViewBatch]:
    loader = view_loader(pictures, CLASSES, scales=scales, flip=True, batch_size=batch_size)
    batches = list(loader)
    assert len(loader) == len(batches)
    assert all(view.dtype == torch.uint8 for batch in batches for view in batch["views"])
    return [normalized(batch, MEAN, STD) for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_picture_once_and_one_size_a_batch(pictures: list[Picture], batch_size: int) -> None:
    batches = load(pictures, batch_size)
    ids = [image_id for batch in batches for image_id in batch["ids"]]
    assert sorted(ids) == [picture.id for picture in pictures]
    by_id = {picture.id: picture for picture in pictures}
    for batch in batches:
        sizes = {Image.open(by_id[image_id].path).size[::-1] for image_id in batch["ids"]}
        assert sizes == {tuple(batch["size"])}
        assert 1 <= len(batch["ids"]) <= batch_size
        assert batch["flip"] is True
        for image_id, labels in zip(batch["ids"], batch["labels"], strict=True):
            assert labels.nonzero()[:, 0].tolist() == list(by_id[image_id].labels or ())
            assert set(labels.tolist()) <= {0.0, 1.0}
    # Five pictures of one size, two of another and one of a third.
    assert len(batches) == sum(-(-count // batch_size) for count in (5, 2, 1))


def by_picture(batches: list[ViewBatch]) -> dict[str, list[Tensor]]:
    return {
        image_id: [view[place] for view in batch["views"]]
        for batch in batches
        for place, image_id in enumerate(batch["ids"])
    }


def test_views_by_hand(pictures: list[Picture]) -> None:
    # Half and one and a half of the sides, halves to even.
    scaled = {
        (40, 30): [(20, 15), (40, 30), (60, 45)],
        (30, 40): [(15, 20), (30, 40), (45, 60)],
        (25, 27): [(12, 14), (25, 27), (38, 40)],
    }
    views = by_picture(load(pictures, 1))
    for picture in pictures:
        image = Image.open(picture.path).convert("RGB")
        for view, size in zip(views[picture.id], scaled[image.size], strict=True):
            pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64)
            expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
            assert view.dtype == torch.float32
            np.testing.assert_allclose(view.numpy(), expected.transpose(2, 0, 1), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_batch_changes_nothing_of_a_picture(pictures: list[Picture], batch_size: int) -> None:
    alone, together = by_picture(load(pictures, 1)), by_picture(load(pictures, batch_size))
    assert alone.keys() == together.keys()
    for image_id, views in alone.items():
        for ours, theirs in zip(together[image_id], views, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_one_at_a_time_keeps_the_order(pictures: list[Picture]) -> None:
    ids = [image_id for batch in load(pictures, 1) for image_id in batch["ids"]]
    assert ids == [picture.id for picture in pictures]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_picture_is_named(pictures: list[Picture], num_workers: int) -> None:
    data = pictures[3].path.read_bytes()
    pictures[3].path.write_bytes(data[: len(data) // 2])
    loader = view_loader(
        pictures,
        CLASSES,
        scales=[1.0],
        flip=False,
        batch_size=2,
        num_workers=num_workers,
    )
    with pytest.raises(InputError, match=r"3\.png: not a readable image"):
        list(loader)


@pytest.mark.parametrize(
    ("given", "gpus", "cores", "expected"),
    [(3, 1, 16, 3), (0, 0, 2, 0), (None, 0, 64, 1), (None, 1, 16, 8), (None, 8, 32, 3),
     (None, 2, 2, 1)],
)  # fmt: skip
def test_processes_that_decode(
    monkeypatch: pytest.MonkeyPatch, given: int | None, gpus: int, cores: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert decoders(given)["num_workers"] == expected


def byte_crop() -> RandomCrop:
    scale = by_long_side((16, 16))
    return RandomCrop((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), scale=scale, crop=16)


@pytest.mark.parametrize(
    ("batch_size", "shuffle", "sizes"),
    [
        (3, True, [3, 3]),  # an incomplete last batch is left out ...
        (3, False, [3, 3, 2]),  # ... of training, not of validation
        (4, True, [4, 4]),
        (8, True, [8]),
        (9, True, [8]),  # fewer pictures than a batch: all of them
        (9, False, [8]),
    ],
)
def test_the_last_training_batch(
    pictures: list[Picture], batch_size: int, shuffle: bool, sizes: list[int]
) -> None:
    loader = train_loader(pictures, CLASSES, byte_crop(), batch_size=batch_size, shuffle=shuffle)
    batches = list(loader)
    assert len(loader) == len(sizes)
    assert [len(images) for images, _ in batches] == sizes
    assert [len(labels) for _, labels in batches] == sizes
    assert all(images.shape[1:] == (3, 16, 16) for images, _ in batches)


@pytest.mark.parametrize("shuffle", [True, False])
def test_training_pairs(tmp_path: Path, shuffle: bool) -> None:
    # The colour of each picture is 10 times its number, and so are its labels in binary.
    pictures = []
    for index in range(8):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (16, 16), (10 * index + 5, 0, 0)).save(path)
        labels = tuple(c for c in range(CLASSES) if index >> c & 1)
        pictures.append(Picture(f"{index}", path, labels))
    loader = train_loader(pictures, CLASSES, byte_crop(), batch_size=4, shuffle=shuffle)
    torch.manual_seed(42)
    orders = []
    for _ in range(2):
        order = []
        for images, labels in loader:
            for image, label in zip(images, labels, strict=True):
                number = round((image[0].max().item() - 5) / 10)
                assert label.tolist() == [float(number >> c & 1) for c in range(CLASSES)]
                order.append(number)
        assert sorted(order) == list(range(8))
        orders.append(order)
    if shuffle:
        assert orders[0] != orders[1]
    else:
        assert orders == [list(range(8))] * 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_pooled_pairs(shuffle: bool) -> None:
    pooled = np.arange(35, dtype=np.float32).reshape(7, 5)
    labels = (np.arange(7)[:, None] >> np.arange(CLASSES) & 1).astype(np.float32)
    loader = pooled_loader(pooled, labels, batch_size=3, shuffle=shuffle)
    torch.manual_seed(43)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    order = []
    for x, y in batches:
        for features, shown in zip(x, y, strict=True):
            number = int(features[0]) // 5
            np.testing.assert_array_equal(features.numpy(), pooled[number])
            np.testing.assert_array_equal(shown.numpy(), labels[number])
            order.append(number)
    assert sorted(order) == list(range(7))
    assert (order == list(range(7))) is not shuffle


def test_every_process_gets_a_batch(pictures: list[Picture]) -> None:
    loader = view_loader(pictures[:2], CLASSES, scales=[1.0], flip=False, processes=5)
    assert [batch["ids"] for batch in loader] == [["picture-0"], *[["picture-1"]] * 4]
    loader = view_loader(pictures, CLASSES, scales=[1.0], flip=False, processes=5)
    assert len(loader) == 8


def test_no_process_is_left_without_a_batch_to_learn_from(pictures: list[Picture]) -> None:
    def count(processes: int, batch_size: int) -> int:
        crop = RandomCrop(MEAN, STD, scale=by_long_side((32, 32)), crop=32)
        size = batch_size // processes
        made = train_loader(pictures, CLASSES, crop, batch_size=size, processes=processes)
        assert isinstance(made.dataset, Dataset)
        share = DistributedSampler(made.dataset, processes, 0)
        again = DataLoader(made.dataset, size, sampler=share, drop_last=made.drop_last)
        return len(list(again))

    assert count(1, 16) == 1
    assert count(2, 12) == 1  # of 4 pictures, where a batch is of 6
    assert count(2, 6) == 1  # and one of 3 is full
