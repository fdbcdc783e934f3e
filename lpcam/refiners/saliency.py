"""EDAM's post-processing: a saliency map says where objects are, the maps say which.

Wu et al., "Embedded Discriminative Attention Mechanism for Weakly Supervised Semantic
Segmentation", CVPR 2021, algorithm 1. The LPCAM paper combines EDAM with LPCAM in this way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from lpcam.data.dataset import Picture, open_image
from lpcam.data.files import files_digest
from lpcam.errors import InputError
from lpcam.refiners.base import Refiner
from lpcam.refiners.crf import Backend, check_backend, crf_parameters, dense_crf, with_background
from lpcam.seeds.masks import scores_of_labels
from lpcam.seeds.record import SeedRecord
from lpcam.settings import CHECKED, Share, Text

# Alpha and beta as published; a CRF's probabilities are nearly 0 or 1.
AFTER_CRF = (1e-6, 0.99999)
WITHOUT_CRF = (0.25, 0.95)


def saliency_labels(
    scores: Tensor, saliency: Tensor, *, theta: float = 0.2, alpha: float, beta: float
) -> Tensor:
    """Decide each pixel's label from class scores and saliency.

    A salient pixel gets its strongest class, or background where no class reaches alpha. Any other
    pixel is background, unless a class exceeds beta. Classes beyond beta count the same; the first
    one wins.

    Args:
        scores: Class scores ``(L, H, W)`` in 0..1.
        saliency: Saliency ``(H, W)``, 0..255; a pixel is salient above ``100 theta``.
        theta: See above; the published 0.2 means 20 of 255.
        alpha: The least score of a class at a salient pixel.
        beta: The score that makes up for missing saliency.

    Returns:
        Labels ``(H, W)`` int64: 0 background, place among the L classes + 1.
    """
    background = (saliency <= 100 * theta).to(scores)
    clipped = torch.where(scores < alpha, -2.0, torch.where(scores > beta, 2.0, scores))
    return torch.cat([background[None], clipped]).argmax(0)


class Saliency(Refiner):
    """EDAM's rule, with or without its CRF first. A score above 0.5 is the rule's decision.

    The saliency map of a picture is ``<folder>/<id>.png``, 8-bit greyscale at the picture's size.

    Args:
        folder: Where the saliency maps are.
        theta: See :func:`saliency_labels`.
        alpha: Likewise; None for what is published, 1e-6 after a CRF and 0.25 without.
        beta: Likewise; 0.99999 and 0.95.
        crf: Parameters of the CRF before the rule, see :func:`~lpcam.refiners.crf.crf_parameters`;
            None for no CRF. Its background probability is 1 minus the strongest map, as published.
        backend: See :func:`~lpcam.refiners.crf.dense_crf`.
        **options: See :class:`~lpcam.refiners.base.Refiner`.
    """

    uses: ClassVar[str] = "saliency"

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        folder: Text | Path,
        *,
        theta: Annotated[float, Field(ge=0, lt=2.55)] = 0.2,
        alpha: Share | None = None,
        beta: Share | None = None,
        crf: str | Mapping[str, Any] | None = "edam",
        backend: Backend = "pydensecrf",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        published = WITHOUT_CRF if crf is None else AFTER_CRF
        self.folder = Path(folder).expanduser()
        self.theta = theta
        self.alpha = published[0] if alpha is None else alpha
        self.beta = published[1] if beta is None else beta
        self.crf = None if crf is None else crf_parameters(crf, "refiner.crf")
        self.backend = backend

    @property
    def mask_background(self) -> float:
        """The rule's decision."""
        return 0.5

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:  # noqa: D102 - inherited
        if self.crf:
            check_backend(self.backend)
        names = [f"{picture.id}.png" for picture in pictures]
        files = files_digest(self.folder, names, "refiner.folder")
        crf = asdict(self.crf) if self.crf else None
        return {**super().inputs(pictures), "folder": files, "crf": crf}

    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:  # noqa: D102 - inherited
        saliency = torch.from_numpy(read_saliency(self.folder / f"{image_id}.png", seed.size))
        scores = seed.full_size()
        if self.crf:
            unary = with_background(scores, 1, power=True)
            scores = dense_crf(np.array(image), unary, self.crf, backend=self.backend)[1:]
        labels = saliency_labels(
            scores, saliency, theta=self.theta, alpha=self.alpha, beta=self.beta
        )
        return SeedRecord(seed.keys, scores_of_labels(scores, labels).half().numpy(), seed.size)


def read_saliency(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a saliency map ``(H, W)`` uint8.

    Raises:
        InputError: The file is missing, damaged, not 8-bit greyscale, or of another size.
    """
    with open_image(path) as image:
        if image.mode != "L" or image.size != size[::-1]:
            raise InputError(
                f"{path}: saliency of mode {image.mode}, {image.width}x{image.height}; save 8-bit "
                f"greyscale at the picture's size, {size[1]}x{size[0]}"
            )
        return np.array(image)
