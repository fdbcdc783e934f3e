"""The pictures that every run shows: chosen once, the same whatever the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset, open_picture
from lpcam.errors import InputError
from lpcam.reporting.gallery import PANEL_SIDE
from lpcam.reporting.scores import Method
from lpcam.visualize import mask_overlay, to_grey, to_image

COUNT = 4
SAVED = 6  # pictures of a sweep's gallery, and those that save=shown leaves in a run's folder


@dataclass(frozen=True)
class Shown:
    """A picture with its masks, at most 320 pixels a side.

    Attributes:
        id: The picture's name.
        image: The picture, RGB.
        masks: Masks ``(H, W)`` uint8 by name: 0 background, class index + 1, 255 unknown.
    """

    id: str
    image: Image.Image
    masks: Mapping[str, np.ndarray]

    def overlays(self) -> list[tuple[str, Image.Image]]:
        """The picture, then each mask laid over it, with their names; all of one size."""
        grey = to_grey(self.image)
        drawn = [(name, to_image(mask_overlay(grey, mask))) for name, mask in self.masks.items()]
        return [("picture", self.image), *drawn]


def choose_pictures(
    pictures: Sequence[Picture], ids: Sequence[str] | None = None, count: int = COUNT
) -> list[Picture]:
    """The pictures to show: those asked for, or a few spread over the classes.

    The choice depends on ids and image labels alone, so every setting shows the same pictures.

    Args:
        pictures: The pictures of a split, in any order.
        ids: Names of the pictures to show, in this order; None to choose.
        count: How many to choose; fewer where the split has fewer.

    Raises:
        InputError: A picture that is asked for is not in the split.
    """
    by_id = {picture.id: picture for picture in sorted(pictures, key=lambda p: p.id)}
    if ids is not None:
        missing = [name for name in ids if name not in by_id]
        if missing:
            raise InputError(
                f"shown_pictures, --gallery: no picture {missing[0]} in the split that is shown; "
                f"give ids such as {next(iter(by_id), 'none')}"
            )
        return [by_id[name] for name in ids]
    labels = sorted({label for picture in pictures for label in picture.labels or ()})
    apart = max(len(labels) / count, 1)  # of many classes, those that lie evenly apart
    chosen: list[Picture] = []
    for turn in range(min(count, len(by_id))):
        wanted = labels[int(turn * apart) % len(labels)] if labels else None
        left = [picture for picture in by_id.values() if picture not in chosen]
        fitting = (picture for picture in left if wanted in (picture.labels or ()))
        chosen.append(next(fitting, left[0]))
    return chosen


def saved_pictures(
    dataset: SegmentationDataset, split: str, ids: Sequence[str] | None, *, few: bool
) -> Sequence[Picture]:
    """The pictures of a split whose maps and masks go into a run's folder.

    Args:
        dataset: The data set.
        split: The split.
        ids: Names of the pictures of the last split to show; None to choose.
        few: Only those to show, not all.
    """
    pictures = dataset.pictures(split)
    if not few:
        return pictures
    return choose_pictures(pictures, ids if split == dataset.map_splits[-1] else None, SAVED)


def show(
    dataset: SegmentationDataset,
    pictures: Sequence[Picture],
    methods: Mapping[str, Method],
    split: str,
    threshold: float,
) -> list[Shown]:
    """Read pictures, their true masks and the masks of every method.

    Args:
        dataset: Reads the true masks.
        pictures: The pictures.
        methods: By stage (``cam``, ``lpcam``, ...), which names the mask. Masks are made at each
            method's best background threshold.
        split: Which split the pictures are of.
        threshold: Background score where the split has no scores.
    """
    shown = []
    for picture in pictures:
        image = open_picture(picture.path)
        image.thumbnail((PANEL_SIDE, PANEL_SIDE))
        truth = dataset.mask(picture)
        masks = {} if truth is None else {"truth": truth}
        for stage, method in methods.items():
            masks[stage] = method.mask(split, picture, threshold)
        small = {
            # Nearest neighbour: between two class numbers lies no class.
            name: np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
            for name, mask in masks.items()
        }
        shown.append(Shown(picture.id, image, small))
    return shown
