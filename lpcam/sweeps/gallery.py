"""The same pictures under several settings of a sweep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset, open_image, open_picture
from lpcam.errors import InputError
from lpcam.reporting.gallery import foreground_iou
from lpcam.sweeps.charts import evenly
from lpcam.sweeps.findings import Sweep
from lpcam.sweeps.jobs import Job, group
from lpcam.visualize import mask_overlay, to_grey, to_image

MOST_SETTINGS = 14  # seven refiners on either seed side by side
SIDE = 200  # pixels of a panel


@dataclass(frozen=True)
class Row:
    """A picture and its masks.

    Attributes:
        picture: Which.
        image: The picture itself, at most 200 pixels a side, as all others here.
        truth: Its true mask, if there is one.
        masks: The mask of each setting with its IoU, NaN without truth; None where it lacks.
    """

    picture: Picture
    image: Image.Image
    truth: Image.Image | None
    masks: Sequence[tuple[Image.Image, float] | None]


def choose_jobs(sweep: Sweep, count: int = MOST_SETTINGS) -> list[Job]:
    """Settings at even distances along the axes, the best among them, each by its first seed.

    Args:
        sweep: The sweep.
        count: At most so many.
    """
    made = [job for job in sweep.done if (job.folder / "masks").is_dir()]
    firsts = [jobs[0] for jobs in group(made, sweep.factors).values()]
    chosen = evenly(firsts, count)
    best = sweep.best
    if best in firsts and best not in chosen:
        place = firsts.index(best)
        nearest = min(chosen, key=lambda job: abs(firsts.index(job) - place))
        chosen[chosen.index(nearest)] = best
    return chosen


def make_rows(
    dataset: SegmentationDataset, pictures: Sequence[Picture], jobs: Sequence[Job]
) -> list[Row]:
    """Lay the masks of each job over the pictures.

    Args:
        dataset: Reads the true masks.
        pictures: The rows.
        jobs: The columns.

    Raises:
        InputError: A picture or its true mask cannot be read.
    """
    rows = []
    for picture in pictures:
        image = open_picture(picture.path)
        grey, truth = to_grey(image), dataset.mask(picture)
        masks: list[tuple[Image.Image, float] | None] = []
        for job in jobs:
            mask = _read_mask(job, picture, image.size)
            if mask is None:
                masks.append(None)
                continue
            iou = math.nan if truth is None else foreground_iou(truth, mask)
            masks.append((_shrink(to_image(mask_overlay(grey, mask))), iou))
        true_overlay = None if truth is None else _shrink(to_image(mask_overlay(grey, truth)))
        rows.append(Row(picture, _shrink(image), true_overlay, masks))
    return rows


def _read_mask(job: Job, picture: Picture, size: tuple[int, int]) -> np.ndarray | None:
    """A pseudo mask, or None if it is missing, damaged or another picture's."""
    try:
        image = open_image(job.folder / "masks" / f"{picture.id}.png")
    except InputError:
        return None
    return np.asarray(image) if image.mode in ("P", "L") and image.size == size else None


def _shrink(image: Image.Image) -> Image.Image:
    image.thumbnail((SIDE, SIDE))
    return image
