import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lpcam.data.dataset import Picture
from lpcam.reporting.gallery import (
    Example,
    caption,
    choose,
    foreground_iou,
    heat_overlay,
    mask_overlay,
)
from lpcam.reporting.scores import Method
from lpcam.seeds.palette import palette

labels = hnp.arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2, 255]))
predictions = hnp.arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2]))


@given(labels, predictions)
def test_iou_of_a_picture_is_that_of_sets_of_pixels(
    truth: np.ndarray, prediction: np.ndarray
) -> None:
    known = {spot for spot in np.ndindex(truth.shape) if truth[spot] != 255}
    ious = []
    for label in (1, 2):
        true = {spot for spot in known if truth[spot] == label}
        predicted = {spot for spot in known if prediction[spot] == label}
        if true:
            ious.append(len(true & predicted) / len(true | predicted))

    found = foreground_iou(truth, prediction)

    assert found == pytest.approx(sum(ious) / len(ious)) if ious else math.isnan(found)


def example(name: str, baseline: float, compared: float) -> Example:
    return Example(Picture(name, None, (1, 0)), baseline, compared)


def test_the_largest_gains_and_worst_losses_are_chosen() -> None:
    examples = [
        example("small gain", 0.5, 0.625),
        example("z large gain", 0.25, 0.75),
        example("same", 0.5, 0.5),
        example("a large gain", 0.0, 0.5),
        example("small loss", 0.5, 0.375),
        example("large loss", 1.0, 0.25),
    ]

    chosen = choose(examples, 2)

    assert [e.picture.id for e in chosen["Largest gains"]] == ["a large gain", "z large gain"]
    assert [e.picture.id for e in chosen["Worst losses"]] == ["large loss", "small loss"]
    assert choose(examples[2:3], 2) == {"Largest gains": [], "Worst losses": []}


def test_a_caption_names_classes_and_both_ious() -> None:
    methods = [Method("CAM", {}, {}), Method("LPCAM", {}, {})]

    assert caption(example("a", 0.25, 0.5), ["cat", "dog"], methods) == (
        "dog, cat: IoU CAM 25.0 → LPCAM 50.0 (+25.0)"
    )
    assert caption(Example(Picture("a", None, ())), [], methods) == "no class"


def test_more_activation_is_brighter_and_none_shows_the_picture() -> None:
    grey = np.zeros((1, 11, 3), np.float32)
    grey[..., :] = np.linspace(0, 1, 11)[:, None]
    rising = np.linspace(0, 1, 11, dtype=np.float32)[None]

    over_black = heat_overlay(np.zeros_like(grey), rising).mean(-1)[0]
    over_grey = heat_overlay(grey, np.zeros_like(rising)).mean(-1)[0]

    assert (np.diff(over_black) > 0).all()
    assert (np.diff(over_grey) > 0.05).all()


def test_masks_have_the_colours_of_the_palette() -> None:
    mask = np.array([[0, 1, 2, 7]], np.uint8)

    shown = mask_overlay(np.ones((1, 4, 3), np.float32), mask)[0]

    colours = np.reshape(palette(), (-1, 3))[mask[0]] / 255
    np.testing.assert_allclose(shown[0], 1)
    np.testing.assert_allclose(shown[1:], 0.8 * colours[1:] + 0.2, atol=1e-6)
