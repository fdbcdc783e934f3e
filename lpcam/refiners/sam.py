"""Merging a pseudo mask with the masks of Segment Anything (SAM), where those exist as files.

Chen et al., "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly Supervised Semantic
Segmentation", 2023 (SEPL).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.data.files import files_digest
from lpcam.errors import InputError
from lpcam.refiners.base import Refiner
from lpcam.seeds.masks import scores_of_labels, seed_mask
from lpcam.seeds.record import SeedRecord
from lpcam.settings import CHECKED, Share, Text
from lpcam.storage.arrays import DAMAGE, read_arrays


def merge_masks(
    labels: np.ndarray, masks: np.ndarray, *, mask_share: float = 0.5, class_share: float = 0.85
) -> np.ndarray:
    """Give each mask that lies well within a class's region to that class.

    Class by class in ascending order, a mask that no class has yet is taken when more than
    ``mask_share`` of its pixels belong to the class, or when it holds at least ``class_share`` of
    the class's pixels. Pixels that no mask at all covers keep their label; the others get the class
    whose mask covers them, the later one where there are two, or become background.

    Args:
        labels: Pseudo mask ``(H, W)``, integers, 0 background.
        masks: Masks ``(M, H, W)`` bool. They may overlap, be empty, and M may be 0.
        mask_share: See above.
        class_share: See above.

    Returns:
        Labels ``(H, W)`` of the same type.
    """
    flat = masks.reshape(len(masks), labels.size)
    free = flat.any(1)
    area = flat.sum(1)
    merged = np.where(flat.any(0).reshape(labels.shape), 0, labels)
    for label in np.unique(labels[labels > 0]):
        region = (labels == label).ravel()
        overlap = (flat & region).sum(1)
        taken = free & ((overlap > mask_share * area) | (overlap >= class_share * region.sum()))
        merged[flat[taken].any(0).reshape(labels.shape)] = label
        free &= ~taken
    return merged


class SAMMerge(Refiner):
    """Merge the seed's pseudo mask with masks from files.

    The masks of a picture lie in ``<folder>/<id>.npz``: one array ``masks`` (M, H, W) bool, at the
    picture's size. A score above 0.5 is the merged mask's.

    Args:
        folder: Where the files are.
        mask_share: See :func:`merge_masks`.
        class_share: Likewise.
        **options: See :class:`~lpcam.refiners.base.Refiner`.
    """

    uses: ClassVar[str] = "SAM"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        folder: Text | Path,
        *,
        mask_share: Share = 0.5,
        class_share: Share = 0.85,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = Path(folder).expanduser()
        self.mask_share = mask_share
        self.class_share = class_share

    @property
    def mask_background(self) -> float:
        """What the merging decided."""
        return 0.5

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:  # noqa: D102 - inherited
        names = [f"{picture.id}.npz" for picture in pictures]
        files = files_digest(self.folder, names, "refiner.folder")
        merged = {"seed_background": self.seed_background}
        return {**super().inputs(pictures), **merged, "folder": files}

    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:  # noqa: D102 - inherited
        masks = read_masks(self.folder / f"{image_id}.npz", seed.size)
        maps = seed.full_size()
        places = np.arange(len(seed.keys))
        labels = merge_masks(
            seed_mask(maps, places, self.seed_background),
            masks,
            mask_share=self.mask_share,
            class_share=self.class_share,
        )
        scores = scores_of_labels(maps, torch.from_numpy(labels))
        return SeedRecord(seed.keys, scores.half().numpy(), seed.size)


def read_masks(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the masks ``(M, H, W)`` bool of one picture.

    Raises:
        InputError: The file is missing, damaged, or holds something else.
    """
    try:
        masks = read_arrays(path)["masks"]
    except DAMAGE as error:
        raise InputError(f"{path}: not readable masks ({error}); make the file again") from error
    if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != size:
        raise InputError(
            f"{path}: masks are {masks.dtype} of shape {masks.shape}, the picture has {size[1]}x"
            f"{size[0]} pixels; save bool (M, {size[0]}, {size[1]})"
        )
    return masks
