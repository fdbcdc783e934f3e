"""Local features of a class's pictures, split into foreground and context (the paper's 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import InputError
from lpcam.functional import normalize_maps
from lpcam.prototypes.class_head import ClassHead
from lpcam.settings import CHECKED, Count, Seed

# Bytes of a block of collected rows. The C library gives allocations of more than 32 MiB back to
# the system as soon as they are freed; smaller ones it keeps.
BLOCK = 2**26


@dataclass(frozen=True)
class LocalFeatures:
    """Local features of one class on one side of the split, and where they come from.

    Attributes:
        rows: Features ``(N, D)``, half precision.
        places: For each row, index of the picture, grid row and grid column ``(N, 3)`` int32.
    """

    rows: Tensor
    places: Tensor


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Draw:
    """Which pictures of a class are clustered.

    Attributes:
        images_per_class: How many at random; None for all that show the class.
        with_replacement: Draw as the published code does on COCO: a picture may come twice, and a
            class with fewer pictures gets as many draws. Otherwise such a class gives all it has.
        seed: Seed of the draw. A class's draw does not depend on the other classes.
    """

    images_per_class: Count | None = None
    with_replacement: bool = False
    seed: Seed = 0


def draw_pictures(labels: np.ndarray, draw: Draw) -> list[list[int]]:
    """Choose the pictures from which each class's features are taken.

    Args:
        labels: Image labels ``(N, C)``.
        draw: How.

    Returns:
        For each class the indices of its pictures, ascending.
    """
    chosen = []
    for c in range(labels.shape[1]):
        shown = np.flatnonzero(labels[:, c])
        count = draw.images_per_class
        if count is not None and len(shown):
            count = count if draw.with_replacement else min(count, len(shown))
            generator = np.random.default_rng([draw.seed, c])
            shown = np.sort(generator.choice(shown, count, replace=draw.with_replacement))
        chosen.append(shown.tolist())
    return chosen


def split_features(
    read: Callable[[int], np.ndarray],
    pictures: Sequence[int],
    head: ClassHead,
    class_index: int,
    tau: float,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    read_map: Callable[[int], np.ndarray] | None = None,
    strict: bool = False,
) -> tuple[LocalFeatures, LocalFeatures]:
    """Split the local features of one class's pictures by the classifier's own map of the class.

    Context includes other classes in the same pictures, as in the paper.

    Args:
        read: Gives a picture's local features ``(h, w, D)`` by its index.
        pictures: Indices of the pictures that show the class.
        head: Gives the map of the features.
        class_index: The class.
        tau: Where the map, in 0..1, reaches it lies foreground; context elsewhere.
        transform: Applied to features ``(n, D)`` once they are split; nothing by default.
        read_map: Gives a picture's map of the class ``(h, w)`` in 0..1 by its index, in the place
            of the head's.
        strict: Compare strictly on both sides, as the published code does: a feature whose map
            equals tau is on neither.

    Returns:
        Foreground and context.

    Raises:
        InputError: Features are infinite or NaN.
    """
    rows, places = (_Rows(), _Rows()), (_Rows(), _Rows())
    classes = torch.tensor([class_index])
    for index in pictures:
        local = torch.from_numpy(read(index))
        if not local.isfinite().all():
            raise InputError(
                f"features of picture {index}: not finite in half precision; "
                "check the picture and the model"
            )
        if read_map is None:
            maps = head.own_maps(local.float().permute(2, 0, 1)[None], classes)
            own_map = normalize_maps(maps)[0, 0]
        else:
            own_map = torch.from_numpy(read_map(index))
        masks = (own_map > tau if strict else own_map >= tau, own_map < tau)
        for side, mask in enumerate(masks):
            part = local[mask]
            rows[side].add(part if transform is None else transform(part.float()).half())
            places[side].add(F.pad(mask.nonzero().int(), (1, 0), value=index))
    first, second = (
        LocalFeatures(r.joined(), p.joined()) for r, p in zip(rows, places, strict=True)
    )
    return first, second


class _Rows:
    """Rows that come in small parts, copied into blocks so that no part stays in memory.

    ``torch.cat`` of the parts would hold all rows twice, and many small allocations that live on
    between short-lived ones leave the heap full of holes: together 1.2 GB for a class of VOC's.
    """

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.free = 0

    def add(self, part: Tensor) -> None:
        while len(part) or not self.blocks:
            if not self.free:
                self.free = max(1, BLOCK // (part.shape[1] * part.element_size()))
                self.blocks.append(part.new_empty(self.free, *part.shape[1:]))
            block, taken = self.blocks[-1], min(self.free, len(part))
            start = len(block) - self.free
            block[start : start + taken] = part[:taken]
            self.free -= taken
            part = part[taken:]

    def joined(self) -> Tensor:
        """All rows in the order they came. Each block is let go of as soon as it is copied."""
        end = sum(map(len, self.blocks)) - self.free
        joined = self.blocks[0].new_empty(end, *self.blocks[0].shape[1:])
        while self.blocks:
            block = self.blocks.pop()
            filled = block[: len(block) - self.free]
            joined[end - len(filled) : end] = filled
            end -= len(filled)
            self.free = 0
        return joined
