from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lpcam.seeds.masks import mark_unsure, scores_of_labels, seed_mask
from lpcam.seeds.palette import palette, save_mask
from tests.oracles.segmentation import seed_mask as slow_seed_mask


def test_seed_mask_by_hand() -> None:
    maps = torch.tensor([[[0.9, 0.3], [0.5, 0.25]], [[0.1, 0.6], [0.5, 0.2]]])
    mask = seed_mask(maps, np.array([4, 19]), 0.25)
    assert mask.dtype == np.uint8
    # Of equals the first class wins; a score that equals the background is background.
    np.testing.assert_array_equal(mask, [[5, 20], [5, 0]])


def test_seed_mask_without_classes() -> None:
    mask = seed_mask(torch.zeros(0, 3, 4), np.zeros(0, np.int64), 0.0)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.zeros((3, 4)))


tenths = st.integers(0, 10).map(lambda i: np.float32(i / 10))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(3), st.just(4)), elements=tenths),
    st.integers(0, 10),
)
def test_seed_mask(maps: np.ndarray, threshold: int) -> None:
    classes = [7, 2, 79][: len(maps)]
    mask = seed_mask(torch.from_numpy(maps), np.array(classes), threshold / 10)
    np.testing.assert_array_equal(mask, slow_seed_mask(maps, classes, threshold / 10))


def test_palette_is_that_of_voc() -> None:
    colours = np.array(palette()).reshape(256, 3)
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        4: (0, 0, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(int(v) for v in colours[label]) for label in known} == known
    assert len(np.unique(colours, axis=0)) == 256


def test_mask_file_keeps_labels_and_shows_colours(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 15], [20, 255, 2]], np.uint8)
    save_mask(tmp_path / "a.png", mask)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        assert image.convert("RGB").getpixel((2, 0)) == (192, 128, 128)


def test_scores_near_the_background_are_unsure() -> None:
    maps = torch.tensor([[[0.0, 0.375, 0.5, 0.75]], [[0.25, 0.0, 0.625, 0.0]]])
    keys = np.array([2, 4])
    mask = seed_mask(maps, keys, 0.5)

    assert mask.tolist() == [[0, 0, 5, 3]]
    assert mark_unsure(mask, maps, 0.5, 0.25).tolist() == [[0, 255, 255, 3]]
    assert mark_unsure(mask, maps, 0.5, 0).tolist() == mask.tolist()
    assert mark_unsure(mask, maps[:0], 0.5, 0.25).tolist() == mask.tolist()


@given(
    maps=hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32)),
    labels=hnp.arrays(np.int64, (4, 5), elements=st.integers(0, 3)),
)
def test_decided_labels_survive_a_record(maps: np.ndarray, labels: np.ndarray) -> None:
    scores = scores_of_labels(torch.from_numpy(maps), torch.from_numpy(labels)).half()

    assert scores.min() >= 0
    assert scores.max() <= 1
    assert seed_mask(scores.float(), np.arange(3), 0.5).tolist() == labels.tolist()
