"""Overlays, grids of pictures, and what each prototype looks at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from lpcam.errors import InputError
from lpcam.seeds.palette import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT_MAP = "inferno"  # perceptually uniform: equal steps of activation look equal


def to_pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Undo the normalisation of pictures.

    Args:
        images: Normalised pictures ``(B, 3, H, W)``.
        mean: Per-channel mean that was subtracted.
        std: Per-channel standard deviation that they were divided by.
    """
    scale, shift = (torch.tensor(v, device=images.device)[:, None, None] for v in (std, mean))
    pixels = (images * scale + shift).clamp(0, 1).permute(0, 2, 3, 1)
    return [to_image(picture) for picture in pixels.cpu().numpy()]


def to_image(pixels: np.ndarray) -> Image.Image:
    """A picture from colours ``(H, W, 3)`` in 0..1."""
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))


def to_grey(picture: Image.Image) -> np.ndarray:
    """A picture without its colours, ``(H, W, 3)`` float32 in 0..1."""
    return np.asarray(picture.convert("L").convert("RGB"), np.float32) / 255


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay one map over a picture.

    Args:
        picture: The picture.
        heat: Activation ``(h, w)`` in 0..1; resized to the picture if it is not of its size.

    Raises:
        InputError: The map has another shape.
    """
    if heat.ndim != 2:
        raise InputError(f"heat: shape {tuple(heat.shape)}; give one map (h, w)")
    size = (picture.height, picture.width)
    heat = heat.detach().float().cpu()
    if heat.shape != size:
        heat = F.interpolate(heat[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return to_image(heat_overlay(to_grey(picture), heat.clamp(0, 1).numpy()))


def heat_overlay(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map over a grey picture.

    Args:
        grey: Picture ``(H, W, 3)`` in 0..1.
        heat: Activation ``(H, W)`` in 0..1.

    Returns:
        Colours ``(H, W, 3)`` in 0..1; where nothing is activated the picture stays visible.
    """
    from matplotlib import colormaps

    opacity = 0.35 + 0.45 * heat[..., None]
    return (1 - opacity) * grey + opacity * colormaps[HEAT_MAP](heat)[..., :3]


def mask_overlay(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Lay a mask in the palette's colours over a paled grey picture, as :func:`heat_overlay`."""
    colours = np.array(palette(), np.float32).reshape(-1, 3)[mask] / 255
    opacity = np.where(mask > 0, 0.8, 0.0)[..., None]
    return (1 - opacity) * (0.78 + 0.22 * grey) + opacity * colours


def instance_overlay(grey: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Lay single objects over a grey picture, as :func:`mask_overlay`, each in a colour of its own.

    Args:
        grey: Picture ``(H, W, 3)`` in 0..1.
        masks: Where each object is ``(H, W)`` bool. They do not overlap.

    Returns:
        Colours ``(H, W, 3)``; where an object ends it is white.
    """
    numbers = np.zeros(grey.shape[:2], np.uint8)
    for place, mask in enumerate(masks):
        numbers[mask] = place % 254 + 1
    colours = mask_overlay(grey, numbers)
    ends = ndimage.maximum_filter(numbers, 5) != ndimage.minimum_filter(numbers, 5)
    colours[ends & (numbers > 0)] = 1
    return colours


def draw_grid(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]
) -> "Figure":
    """Pictures side by side.

    Args:
        title: Above all.
        rows: For each row its caption and its titled pictures; one column a title. A row may leave
            out what others show.

    Raises:
        InputError: There is no row.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise InputError("rows: nothing to show; give at least one")
    titles = [name for name, _ in max((shown for _, shown in rows), key=len)]
    heights = [
        0.35 + 2 * max((image.height / image.width for _, image in shown), default=1)
        for _, shown in rows
    ]
    size = (max(2 * len(titles), 4), 0.8 + sum(heights))  # no narrower than a title
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, name in zip(grid[0], titles, strict=True):
        axes.set_title(name, fontsize=12)
    for axes_row, (text, shown) in zip(grid, rows, strict=True):
        for name, image in shown:
            axes_row[titles.index(name)].imshow(np.asarray(image))
        axes_row[0].set_xlabel(text, loc="left", fontsize=11)
    return figure


def draw_prototypes(
    pictures: Sequence[Image.Image], similarity: Tensor, names: Sequence[str], count: int = 5
) -> "Figure":
    """What each prototype looks at: the pictures that have the most similar place, best first.

    Args:
        pictures: B pictures.
        similarity: Their cosines to P prototypes ``(B, P, h, w)``, from
            :meth:`lpcam.explain.explainer.LPCAM.similarity`.
        names: Names of the prototypes.
        count: At most so many pictures for each.

    Returns:
        A row a prototype. Heat is the cosine where it is positive; its maximum is the caption.
    """
    best = similarity.amax((2, 3))
    rows = []
    for p, name in enumerate(names):
        order = best[:, p].argsort(descending=True, stable=True)[:count].tolist()
        shown = [
            (f"{rank}.", overlay(pictures[b], similarity[b, p].relu()))
            for rank, b in enumerate(order, 1)
        ]
        rows.append((f"{name}: cosine {float(best[order[0], p]):.2f}", shown))
    return draw_grid("What the prototypes look at", rows)
