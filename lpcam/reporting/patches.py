"""What each prototype looks at: the picture patches around the local features nearest to it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lpcam.data.dataset import Picture, open_image
from lpcam.reporting.figures import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATCH_SIDE = 72
PATCH_BUDGET = 1500  # patches in a report; keeps it at a few megabytes however many classes
FIGURE_CLASSES, FIGURE_OWN, FIGURE_CONTEXT = 6, 4, 3


@dataclass(frozen=True)
class PrototypeView:
    """One cluster centre as the report shows it.

    Attributes:
        class_name: Its class.
        side: ``class`` (foreground) or ``context``.
        index: Which cluster of that class and side.
        score: The classifier's probability of the class for this centre.
        count: Local features in the cluster.
        kept: Whether the selection kept it as a prototype.
        patches: The nearest local features, best first: the picture, and the centre (y, x) of the
            grid cell as fractions of its height and width.
    """

    class_name: str
    side: str
    index: int
    score: float
    count: int
    kept: bool
    patches: Sequence[tuple[Picture, tuple[float, float]]]


def crop(image: Image.Image, centre: tuple[float, float]) -> Image.Image:
    """Cut out a square around a point.

    Args:
        image: The picture.
        centre: Fractions (y, x) of its height and width.

    Returns:
        A quarter of the picture's shorter side, moved inwards at the rim, at 72 x 72 pixels.
    """
    side = min(image.size) / 4
    top = min(max(centre[0] * image.height - side / 2, 0), image.height - side)
    left = min(max(centre[1] * image.width - side / 2, 0), image.width - side)
    box = (left, top, left + side, top + side)
    return image.resize((PATCH_SIDE, PATCH_SIDE), Image.Resampling.BICUBIC, box)


def crop_all(views: Sequence[PrototypeView]) -> list[list[Image.Image]]:
    """The patches of every prototype, best first, reading each picture once.

    With very many prototypes each gets fewer patches.
    """
    limit = max(1, PATCH_BUDGET // max(1, len(views)))
    wanted = defaultdict(list)
    for row, view in enumerate(views):
        for place, (picture, centre) in enumerate(view.patches[:limit]):
            wanted[picture.path].append((row, place, centre))
    found: dict[tuple[int, int], Image.Image] = {}
    for path, spots in wanted.items():
        image = open_image(path).convert("RGB")
        for row, place, centre in spots:
            found[row, place] = crop(image, centre)
    return [
        [found[row, place] for place in range(len(view.patches[:limit]))]
        for row, view in enumerate(views)
    ]


@styled
def draw_prototypes(
    views: Sequence[PrototypeView], patches: Sequence[Sequence[Image.Image]]
) -> "Figure":
    """The largest kept prototypes of the first classes, four patches each.

    Args:
        views: The prototypes.
        patches: The patches of each.
    """
    names = list(dict.fromkeys(view.class_name for view in views))[:FIGURE_CLASSES]
    widths = [1.0] * FIGURE_OWN + [0.1] + [1.0] * FIGURE_CONTEXT
    figure = new_figure(1.45 * sum(widths), 0.8 + 1.6 * len(names))
    figure.suptitle("What the prototypes look at", fontsize=14, fontweight="bold")
    grid = figure.subplots(len(names), len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    largest = sorted(zip(views, patches, strict=True), key=lambda pair: -pair[0].count)
    for side, columns, title in (
        ("class", grid[:, :FIGURE_OWN], "class prototypes"),
        ("context", grid[:, FIGURE_OWN + 1 :], "context prototypes (subtracted)"),
    ):
        columns[0, 0].set_title(title, loc="left", fontsize=12)
        for axes_row, name in zip(columns, names, strict=True):
            kept = [
                (view, images)
                for view, images in largest
                if (view.class_name, view.side, view.kept) == (name, side, True)
            ]
            for axes, (view, images) in zip(axes_row, kept, strict=False):
                axes.imshow(_mosaic(images))
                axes.set_xlabel(f"p = {view.score:.2f}", fontsize=9, labelpad=2)
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name, fontsize=11)
    return figure


def _mosaic(patches: Sequence[Image.Image], gap: int = 3) -> np.ndarray:
    """The first four patches in a square ``(H, W, 3)``."""
    step = PATCH_SIDE + gap
    mosaic = Image.new("RGB", (2 * step - gap, 2 * step - gap), "white")
    for place, patch in enumerate(patches[:4]):
        mosaic.paste(patch, (place % 2 * step, place // 2 * step))
    return np.asarray(mosaic)
