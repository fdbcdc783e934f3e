"""Pictures that gain and lose the most between two methods, and what to show of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset, open_image
from lpcam.evaluation.segmentation import IGNORED
from lpcam.reporting.figures import styled
from lpcam.reporting.scores import Method
from lpcam.seeds.masks import seed_mask
from lpcam.storage.parallel import for_each
from lpcam.visualize import (
    HEAT_MAP,
    draw_grid,
    heat_overlay,
    instance_overlay,
    mask_overlay,
    to_grey,
    to_image,
)

PANEL_SIDE = 320
Instances = Callable[[Picture], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Example:
    """A picture and its foreground IoU, in 0..1, under the baseline and the method compared to it.

    Both are NaN where nothing is known of the truth.
    """

    picture: Picture
    baseline: float = math.nan
    compared: float = math.nan

    @property
    def gain(self) -> float:
        """IoU gained over the baseline, in -1..1."""
        return self.compared - self.baseline


def foreground_iou(truth: np.ndarray, prediction: np.ndarray) -> float:
    """IoU of one picture, mean over the classes that its true mask shows.

    Args:
        truth: Labels ``(H, W)``; 0 background, 255 ignored.
        prediction: Labels ``(H, W)``.

    Returns:
        NaN if the true mask shows no class.
    """
    known = truth != IGNORED
    ious = []
    for label in np.unique(truth[known & (truth > 0)]):
        true, predicted = truth == label, known & (prediction == label)
        ious.append((true & predicted).sum() / (true | predicted).sum())
    return float(np.mean(ious)) if ious else math.nan


def compare(
    dataset: SegmentationDataset, pictures: Sequence[Picture], methods: Sequence[Method], split: str
) -> list[Example]:
    """Foreground IoU of every picture under two methods, each at its best threshold.

    Args:
        dataset: Reads the masks.
        pictures: The pictures of the split. Those without mask or without any class in it are
            left out.
        methods: The baseline and the method to compare; both have scores for the split.
        split: Which split.
    """
    found: dict[str, Example] = {}

    def score(picture: Picture) -> None:
        truth = dataset.mask(picture)
        if truth is None:
            return
        masks = (method.mask(split, picture, math.nan) for method in methods)
        ious = [foreground_iou(truth, mask) for mask in masks]
        if not math.isnan(ious[0]):
            found[picture.id] = Example(picture, *ious)

    for_each(score, pictures, "Comparing")
    return [found[picture.id] for picture in pictures if picture.id in found]


def choose(examples: Sequence[Example], count: int) -> dict[str, list[Example]]:
    """The largest gains and the worst losses, the most extreme first, equals by id.

    Args:
        examples: From :func:`compare`.
        count: At most so many of each.

    Returns:
        By heading. What neither gains nor loses is in neither group, and either may be empty.
    """
    ordered = sorted(examples, key=lambda example: example.picture.id)
    return {
        "Largest gains": sorted((e for e in ordered if e.gain > 0), key=lambda e: -e.gain)[:count],
        "Worst losses": sorted((e for e in ordered if e.gain < 0), key=lambda e: e.gain)[:count],
    }


def caption(example: Example, classes: Sequence[str], methods: Sequence[Method]) -> str:
    """An example in a line: the classes that its image label names, and its IoUs in percent."""
    names = ", ".join(classes[label] for label in example.picture.labels or ()) or "no class"
    if math.isnan(example.gain):
        return names
    before, after = (
        f"{method.name} {100 * iou:.1f}"
        for method, iou in zip(methods, (example.baseline, example.compared), strict=True)
    )
    return f"{names}: IoU {before} → {after} ({100 * example.gain:+.1f})"


def panels(
    dataset: SegmentationDataset,
    picture: Picture,
    methods: Sequence[Method],
    split: str,
    threshold: float,
    instances: Instances | None = None,
) -> list[tuple[str, Image.Image]]:
    """What to show of a picture, each with its title, at most 320 pixels a side.

    Args:
        dataset: Reads the true mask.
        picture: The picture.
        methods: Their maps are shown, the strongest class of each pixel, and their masks at the
            best threshold.
        split: Which split the picture is of.
        threshold: Background score of the masks where the split has no scores.
        instances: Gives the instances found in a picture, if they are wanted.

    Returns:
        The picture, a heat map a method, the truth if there is one, a mask a method, the instances.
    """
    image = open_image(picture.path).convert("RGB")
    grey = to_grey(image)
    truth = dataset.mask(picture)
    heats, masks = [], []
    for method in methods:
        seed = method.seed(split, picture)
        maps = seed.full_size()
        heat = maps.amax(0).numpy() if len(maps) else np.zeros(seed.size, np.float32)
        heats.append((method.name, heat_overlay(grey, heat)))
        mask = seed_mask(maps, seed.keys, method.threshold(split, threshold))
        masks.append((f"{method.name} mask", mask_overlay(grey, mask)))
    shown = [("truth", mask_overlay(grey, truth))] if truth is not None else []
    result = [("picture", image)]
    for title, pixels in (*heats, *shown, *masks):
        result.append((title, to_image(pixels)))
    if instances:
        result.append(("instances", to_image(instance_overlay(grey, instances(picture)))))
    for _, panel in result:
        panel.thumbnail((PANEL_SIDE, PANEL_SIDE))
    return result


def heat_scale(steps: int = 9) -> list[str]:
    """Colours of the heat maps from 0 to 1, as CSS writes them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[HEAT_MAP](step / (steps - 1))) for step in range(steps)]


draw_gallery = styled(draw_grid)
