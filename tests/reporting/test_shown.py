from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.errors import InputError
from lpcam.reporting.scores import Method
from lpcam.reporting.shown import choose_pictures, show
from lpcam.seeds.record import SeedRecord, save_seed
from lpcam.storage.records import Records


def pictures(*labels: tuple[int, ...]) -> list[Picture]:
    return [Picture(f"p{i}", Path(f"p{i}.jpg"), its_labels) for i, its_labels in enumerate(labels)]


def ids(found: list[Picture]) -> list[str]:
    return [picture.id for picture in found]


def test_each_class_gets_a_picture_while_there_are_places() -> None:
    found = pictures((0,), (0,), (0,), (1,), (2,), (3,))
    assert ids(choose_pictures(found, count=4)) == ["p0", "p3", "p4", "p5"]


def test_of_many_classes_those_that_lie_evenly_apart() -> None:
    found = pictures(*((c,) for c in range(10)))
    assert ids(choose_pictures(found, count=4)) == ["p0", "p2", "p5", "p7"]


def test_of_few_classes_every_one_again() -> None:
    found = pictures((0,), (1,), (0,), (1,), (0,))
    assert ids(choose_pictures(found, count=4)) == ["p0", "p1", "p2", "p3"]


def test_a_picture_is_shown_once_though_it_has_several_classes() -> None:
    found = pictures((0, 1), (0,), (1,))
    assert ids(choose_pictures(found, count=3)) == ["p0", "p2", "p1"]


def test_where_a_class_runs_out_another_picture_takes_the_place() -> None:
    assert ids(choose_pictures(pictures((0,), (1,), (1,), ()), count=4)) == ["p0", "p1", "p2", "p3"]


def test_the_order_of_the_list_does_not_matter() -> None:
    found = pictures((0,), (1,), (0, 2), (3,), (4,), (1,), (5,))
    expected = ids(choose_pictures(found))
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert ids(choose_pictures([found[i] for i in rng.permutation(len(found))])) == expected


def test_fewer_pictures_than_places() -> None:
    assert ids(choose_pictures(pictures((), ()), count=4)) == ["p0", "p1"]
    assert choose_pictures([], count=4) == []


def test_pictures_that_are_asked_for() -> None:
    found = pictures((0,), (1,), (2,))
    assert ids(choose_pictures(found, ["p2", "p0"])) == ["p2", "p0"]
    assert choose_pictures(found, []) == []
    with pytest.raises(InputError, match=r"shown_pictures.*no picture nine .*such as p0"):
        choose_pictures(found, ["p1", "nine"])


class OnePicture(SegmentationDataset):
    def pictures(self, split: str) -> list[Picture]:
        truth = self.root / "truth.png"
        return [Picture("one", self.root / "one.png", (0, 1), truth if truth.is_file() else None)]


@pytest.fixture
def dataset(tmp_path: Path) -> OnePicture:
    """A picture of 640x480 whose left half the map of class 1 covers, with a score of 0.5."""
    Image.new("RGB", (640, 480), (200, 100, 50)).save(tmp_path / "one.png")
    maps = np.zeros((1, 120, 160))
    maps[0, :, :80] = 0.5
    save_seed(tmp_path / "one.npz", SeedRecord(np.array([1]), maps, (480, 640)))
    return OnePicture(tmp_path, ["cat", "dog"])


def test_masks_are_shrunk_with_the_picture_and_keep_their_numbers(dataset: OnePicture) -> None:
    truth = np.zeros((480, 640), np.uint8)
    truth[:240], truth[240:, 320:] = 1, 255
    Image.fromarray(truth).save(dataset.root / "truth.png")
    methods = {"lpcam": Method("LPCAM", {}, {"val": Records(dataset.root)})}
    (shown,) = show(dataset, dataset.pictures("val"), methods, "val", threshold=0.3)

    assert (shown.id, shown.image.size) == ("one", (320, 240))
    assert {name: mask.shape for name, mask in shown.masks.items()} == {
        "truth": (240, 320),
        "lpcam": (240, 320),
    }
    assert (shown.masks["truth"] == truth[::2, ::2]).all()
    assert (shown.masks["lpcam"][:, :159] == 2).all()  # class 1
    assert (shown.masks["lpcam"][:, 161:] == 0).all()
    (blank,) = show(dataset, dataset.pictures("val"), methods, "val", threshold=0.6)
    assert (blank.masks["lpcam"] == 0).all()


def test_overlays_colour_what_a_mask_covers_and_nothing_else(dataset: OnePicture) -> None:
    methods = {"lpcam": Method("LPCAM", {}, {"val": Records(dataset.root)})}
    (shown,) = show(dataset, dataset.pictures("val"), methods, "val", threshold=0.3)
    (_, plain), (name, drawn) = shown.overlays()

    assert "truth" not in shown.masks
    assert plain is shown.image
    assert name == "lpcam"
    pixels = np.asarray(drawn).astype(int)
    assert np.ptp(pixels[0, 300]) <= 1  # grey
    assert np.ptp(pixels[0, 20]) > 50  # coloured
