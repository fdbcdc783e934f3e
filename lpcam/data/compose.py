"""Placing one or two objects on a background, with the exact mask, boxes and parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lpcam.errors import InputError

PLACEMENTS = 100


@dataclass(frozen=True)
class Sprite:
    """An object cut to its visible bounding box.

    Attributes:
        label: Class index.
        colour: ``(h, w, 3)`` in 0..255.
        alpha: Opacity ``(h, w)`` in 0..1; the object is where it exceeds a half.
        parts: Which part a pixel belongs to ``(h, w)`` uint8, counted from 1, where parts are told.
    """

    label: int
    colour: np.ndarray
    alpha: np.ndarray
    parts: np.ndarray | None = None

    @property
    def solid(self) -> np.ndarray:
        """Where the object is, ``(h, w)`` bool."""
        return self.alpha > 0.5


@dataclass(frozen=True)
class Sample:
    """A composed picture.

    Attributes:
        image: ``(H, W, 3)`` uint8.
        mask: ``(H, W)`` uint8: 0 background, class index + 1.
        objects: Class index of each object and the box of what is seen of it, half-open pixel
            ranges ``(left, top, right, bottom)``.
        parts: ``(H, W)`` uint8, 0 background, if every sprite tells its parts.
    """

    image: np.ndarray
    mask: np.ndarray
    objects: list[tuple[int, tuple[int, int, int, int]]]
    parts: np.ndarray | None


def compose(
    background: np.ndarray,
    sprites: Sequence[Sprite],
    min_visible: float,
    rng: np.random.Generator,
) -> Sample:
    """Place sprites on a background, later ones in front, each wholly inside the picture.

    Args:
        background: ``(H, W, 3)`` uint8.
        sprites: One or two, none larger than the background.
        min_visible: The share of each object that must stay in sight, above 0; places are redrawn
            until it does.
        rng: Where the places come from.

    Raises:
        InputError: No place was found that leaves so much of each object in sight.
    """
    size = background.shape[:2]
    for _ in range(PLACEMENTS):
        corners = _draw_corners([sprite.alpha.shape for sprite in sprites], size, rng)
        owner = np.zeros(size, np.uint8)
        for number, (sprite, corner) in enumerate(zip(sprites, corners, strict=True), 1):
            _window(owner, sprite, corner)[sprite.solid] = number
        seen = [(owner == number).sum() for number in range(1, len(sprites) + 1)]
        if all(n >= min_visible * s.solid.sum() for n, s in zip(seen, sprites, strict=True)):
            return _paint(background, sprites, corners, owner)
    raise InputError(
        f"dataset.min_visible: {min_visible} was not met in {PLACEMENTS} placements; "
        "lower it or dataset.pair_span"
    )


def _draw_corners(
    shapes: Sequence[tuple[int, ...]], size: tuple[int, ...], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Draw each sprite's top left corner; two sprites get a half of the picture each.

    Along the axis that is halved, a centre lies within a quarter of a half's middle; along the
    other, and for a lone sprite, anywhere.
    """
    free = np.array(size) - np.array(shapes)
    corners = rng.uniform(0, free)
    if len(shapes) > 1:
        axis = rng.integers(2)
        halves = rng.permutation([0.25, 0.75]) + rng.uniform(-0.0625, 0.0625, 2)
        centred = halves * size[axis] - np.array(shapes)[:, axis] / 2
        corners[:, axis] = np.clip(centred, 0, free[:, axis])
    return [(int(top), int(left)) for top, left in corners]


def _window(array: np.ndarray, sprite: Sprite, corner: tuple[int, int]) -> np.ndarray:
    (top, left), (height, width) = corner, sprite.alpha.shape
    return array[top : top + height, left : left + width]


def _paint(
    background: np.ndarray,
    sprites: Sequence[Sprite],
    corners: Sequence[tuple[int, int]],
    owner: np.ndarray,
) -> Sample:
    image = background.astype(np.float32)
    mask, parts = np.zeros_like(owner), np.zeros_like(owner)
    objects = []
    for number, (sprite, corner) in enumerate(zip(sprites, corners, strict=True), 1):
        window = _window(image, sprite, corner)
        window += sprite.alpha[..., None] * (sprite.colour - window)
        mask[owner == number] = sprite.label + 1
        if sprite.parts is not None:
            _window(parts, sprite, corner)[sprite.solid] = sprite.parts[sprite.solid]
        rows, columns = np.nonzero(owner == number)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        objects.append((sprite.label, (int(left), int(top), int(right), int(bottom))))
    told = all(sprite.parts is not None for sprite in sprites)
    return Sample(np.rint(image).astype(np.uint8), mask, objects, parts if told else None)
