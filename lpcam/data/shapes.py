"""Drawn creatures that need no data: a head that tells the class, and a body that does not.

A classifier need only look at the head, as it need only look at a bird's; how much of head and
body a map covers can be measured, because every pixel's part is known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from PIL import Image
from pydantic import Field

from lpcam.data.compose import Sprite
from lpcam.data.voc_tree import GeneratedVOC, Pictures, Sides
from lpcam.settings import CHECKED, Text

# Raise it when the same settings give other pictures.
VERSION = 1
CLASSES = ("ringhead", "stripehead", "spothead", "checkhead")
HEAD, BODY = 1, 2
# The two colours of each class's head pattern, and of the body that all share.
HEAD_COLOURS = (
    ((225, 40, 40), (250, 235, 220)),
    ((35, 70, 200), (250, 215, 60)),
    ((30, 140, 60), (245, 245, 245)),
    ((110, 30, 130), (255, 150, 40)),
)
BODY_COLOURS = ((120, 85, 60), (175, 140, 105))
# Two colours each, and the grain: the size in pixels of a blot, down and across.
TEXTURES = {
    "water": ((40, 90, 130), (130, 180, 205), (3, 24)),
    "grass": ((40, 80, 30), (140, 175, 70), (14, 3)),
    "sand": ((195, 170, 120), (235, 215, 170), (2, 2)),
    "stone": ((85, 85, 90), (165, 165, 160), (16, 16)),
}
TIES = {"ringhead": "water", "stripehead": "grass"}
# Ellipses as (centre x, centre y, half-axis x, half-axis y): the head, then body and legs.
ELLIPSES = (
    (1.05, -0.4, 0.5, 0.5),
    (0.0, 0.0, 1.0, 0.55),
    (-0.55, 0.55, 0.14, 0.4),
    (0.45, 0.55, 0.14, 0.4),
)


class Shapes(GeneratedVOC):
    """Four classes of creatures on textures, with a mask of parts in ``Parts/<id>.png``.

    In a parts mask 0 is background, 1 head and 2 body.

    Args:
        root: The folder of the trees.
        train: Pictures in train.
        val: Pictures in val.
        sizes: Pixels; a picture's height and width are each drawn from these.
        tilt: Degrees; a creature leans by up to so much either way.
        **shared: See :class:`~lpcam.data.voc_tree.GeneratedVOC`.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        *,
        train: Pictures = 60,
        val: Pictures = 30,
        sizes: Sides = (96, 112, 128),
        tilt: Annotated[float, Field(ge=0, le=90)] = 20.0,
        **shared: Any,
    ) -> None:
        self.tilt = tilt
        super().__init__(
            root=root,
            classes=CLASSES,
            material={"version": VERSION, "tilt": tilt},
            train=train,
            val=val,
            sizes=sizes,
            **shared,
        )

    def _collect(self) -> dict[str, Any]:
        return {"ties": TIES, "inputs": {}}

    def _background(
        self, split: str, label: int, size: tuple[int, int], rng: np.random.Generator
    ) -> np.ndarray:
        tied = [TIES[CLASSES[label]]] if CLASSES[label] in TIES else []
        dark, light, grain = TEXTURES[self._choose(tied, list(TEXTURES), rng)]
        return np.rint(_mix(dark, light, _noise(size, grain, rng))).astype(np.uint8)

    def _sprite(self, split: str, label: int, span: int, rng: np.random.Generator) -> Sprite:
        """Draw a creature: every pixel belongs to the ellipse in front that holds its centre."""
        mirror = rng.choice([-1, 1])
        angle = np.deg2rad(rng.uniform(-self.tilt, self.tilt))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn = turn @ np.diag([mirror, 1])
        shapes = np.array(ELLIPSES)
        centres = shapes[:, :2] @ turn.T
        reach = np.sqrt(shapes[:, 2:] ** 2 @ (turn**2).T)
        low, high = (centres - reach).min(0), (centres + reach).max(0)
        step = (high - low).max() / span
        width, height = np.maximum(np.ceil((high - low) / step - 1e-6).astype(int), 1)
        rows, columns = np.mgrid[:height, :width]
        points = np.stack([columns, rows], -1) * step + step / 2 + low
        local = (points @ turn)[..., None, :] - shapes[:, :2]
        inside = ((local / shapes[:, 2:]) ** 2).sum(-1) < 1
        parts = np.where(inside[..., 0], HEAD, np.where(inside.any(-1), BODY, 0)).astype(np.uint8)
        head = _mix(*HEAD_COLOURS[label], _pattern(label, local[..., 0, :] / shapes[0, 2:]))
        body = _mix(*BODY_COLOURS, _noise((height, width), (2, 4), rng))
        colour = np.where(inside[..., :1], head, body)
        return Sprite(label, colour, (parts > 0).astype(np.float32), parts)


def _pattern(label: int, point: np.ndarray) -> np.ndarray:
    """Which of the head's two colours is at a point ``(h, w, 2)`` of the unit disc, 0 or 1."""
    x, y = point[..., 0], point[..., 1]
    waves = (
        np.sin(3 * np.pi * np.hypot(x, y)),
        np.sin(2.5 * np.pi * x),
        np.cos(2.5 * np.pi * x) + np.cos(2.5 * np.pi * y) - 0.5,
        np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y),
    )
    return (waves[label] > 0).astype(np.float32)


def _noise(size: tuple[int, int], grain: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise ``size`` in 0..1 whose blots are as large as the grain."""
    height, width = (side // blot + 2 for side, blot in zip(size, grain, strict=True))
    coarse = Image.fromarray(rng.uniform(0, 1, (height, width)).astype(np.float32))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 0.08, size), 0, 1)


def _mix(dark: Sequence[int], light: Sequence[int], share: np.ndarray) -> np.ndarray:
    """Blend two colours by a map ``(h, w)`` of the second one's share, to ``(h, w, 3)``."""
    return np.array(dark) + share[..., None] * np.subtract(light, dark)
