from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from lpcam.refiners.sam import SAMMerge, merge_masks
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord, load_seed, save_seed
from tests.oracles.sam import merge as slow_merge

PICTURES = [Picture(name, Path(f"{name}.jpg"), (0,)) for name in ("a", "b")]


def save(folder: Path, name: str, masks: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", masks=masks)


@settings(max_examples=60, deadline=None)
@given(
    labels=hnp.arrays(np.uint8, (5, 6), elements=st.integers(0, 3)),
    masks=hnp.arrays(bool, st.tuples(st.integers(0, 4), st.just(5), st.just(6))),
    shares=st.tuples(st.sampled_from([0.0, 0.25, 0.5]), st.sampled_from([0.5, 0.85, 1.0])),
)
def test_equals_a_loop_over_masks(
    labels: np.ndarray, masks: np.ndarray, shares: tuple[float, float]
) -> None:
    found = merge_masks(labels, masks, mask_share=shares[0], class_share=shares[1])

    assert found.dtype == labels.dtype
    assert found.tolist() == slow_merge(labels, masks, *shares).tolist()


def test_a_leak_is_cut_and_a_hole_is_filled() -> None:
    """An object of 8x8 pixels; the seed misses two rows of it and leaks two columns."""
    masks = np.zeros((2, 12, 12), bool)
    masks[0, 2:10, 1:9] = True
    masks[1] = ~masks[0]
    seed = np.zeros((12, 12), np.uint8)
    seed[4:10, 1:11] = 7

    assert merge_masks(seed, masks).tolist() == (7 * masks[0]).tolist()


def test_half_a_mask_is_not_enough_but_most_of_the_class_is() -> None:
    labels = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], np.uint8)
    half = np.array([[[0, 0, 1, 1, 1, 1, 0, 0]]], bool)
    whole = np.ones((1, 1, 8), bool)

    # Covered pixels of a mask that is not taken become background.
    assert merge_masks(labels, half).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert merge_masks(labels, whole).tolist() == [[1] * 8]
    assert merge_masks(labels, whole[:0]).tolist() == labels.tolist()


@pytest.mark.parametrize("classes", [0, 1, 4])
@pytest.mark.parametrize("size", [(20, 30), (33, 500)])
def test_records(tmp_path: Path, classes: int, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    masks = random.random((3, *size)) > 0.6
    save(tmp_path / "sam", "a", masks)
    maps = random.random((classes, *size)).astype(np.float16)
    maps[:1] = 0
    keys = 2 * np.arange(classes)

    found = SAMMerge(tmp_path / "sam", seed_background=0.6).refine(
        "a", Image.new("RGB", size[::-1]), SeedRecord(keys, maps, size)
    )

    save_seed(tmp_path / "a.npz", found)
    loaded = load_seed(tmp_path / "a.npz")
    wanted = merge_masks(seed_mask(SeedRecord(keys, maps, size).full_size(), keys, 0.6), masks)
    assert seed_mask(loaded.full_size(), loaded.keys, 0.5).tolist() == wanted.tolist()
    assert wanted.any() == (classes > 1)
    assert ((loaded.maps >= 0) & (loaded.maps <= 1)).all()


def test_inputs_follow_settings_and_files_but_not_the_folders_place(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        for picture in PICTURES:
            save(folder, picture.id, np.zeros((1, 4, 4), bool))
    (tmp_path / "one").rename(tmp_path / "three")
    before = SAMMerge(tmp_path / "three").inputs(PICTURES)
    (tmp_path / "three").rename(tmp_path / "one")

    assert SAMMerge.uses == "SAM"
    assert SAMMerge(tmp_path / "one").inputs(PICTURES) == before
    assert SAMMerge(tmp_path / "one", mask_share=0.4).inputs(PICTURES) != before
    save(tmp_path / "one", "a", np.zeros((2, 4, 4), bool))
    assert SAMMerge(tmp_path / "one").inputs(PICTURES) != before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refiner\.folder=\S+none: no such folder") as caught:
        SAMMerge(tmp_path / "none").inputs(PICTURES)
    assert "\n" not in str(caught.value)
    save(tmp_path / "sam", "a", np.zeros((1, 4, 4), bool))
    with pytest.raises(InputError, match=r"sam lacks 1 of 2 files \(b\.npz\)"):
        SAMMerge(tmp_path / "sam").inputs(PICTURES)


@pytest.mark.parametrize(
    "masks",
    [
        np.zeros((1, 4, 5), bool),
        np.zeros((4, 4), bool),
        np.zeros((1, 4, 4), np.uint8),
        np.array([[{"a": 1}]], dtype=object),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, masks: np.ndarray) -> None:
    save(tmp_path, "a", masks)
    seed = SeedRecord(np.array([0]), np.zeros((1, 1, 1), np.float16), (4, 4))
    with pytest.raises(InputError, match=r"a\.npz: ") as caught:
        SAMMerge(tmp_path).refine("a", Image.new("RGB", (4, 4)), seed)
    assert "\n" not in str(caught.value)
