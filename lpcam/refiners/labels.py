"""Labels for training, from maps: what is surely a class, surely background, or left open."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import IGNORED
from lpcam.refiners.crf import PARAMETERS, dense_crf, label_probabilities
from lpcam.refiners.par import PAR
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord

Method = Literal["par", "crf"]


def relation_labels(
    image: Image.Image, seed: SeedRecord, method: Method, *, conf_fg: float, conf_bg: float
) -> np.ndarray:
    """IRN's labels (section 3.1 of the paper): the maps' masks at a high and at a low threshold.

    A pixel is a class where the mask at ``conf_fg`` says so, background where both masks do, and
    left open elsewhere. ``crf`` refines each mask as the published code does. ``par`` refines the
    maps before they are compared: the refinement takes means, which change no constant background,
    so both masks come from one.

    Args:
        image: The picture.
        seed: Its maps.
        method: ``par`` or ``crf``.
        conf_fg: Background score of the sure foreground.
        conf_bg: Background score of the sure background.

    Returns:
        ``(H, W)`` uint8: 0 background, class index + 1, 255 open.
    """
    maps = _par(image, seed.full_size()) if method == "par" else seed.full_size()
    masks = [seed_mask(maps, seed.keys, threshold) for threshold in (conf_fg, conf_bg)]
    if method == "crf":
        masks = [_crf_mask(image, mask, seed.keys) for mask in masks]
    sure, possible = masks
    return np.where(sure > 0, sure, np.where(possible > 0, IGNORED, 0)).astype(np.uint8)


def affinity_labels(
    image: Image.Image, seed: SeedRecord, method: Method, *, low: float, high: float, stride: int
) -> np.ndarray:
    """PSA's labels (section 3.2 of the paper), constant in square cells.

    Background scores ``(1 - strongest map) ** power``. The lower power makes it stronger: what is a
    class even then surely is one. What is background even with the higher power surely is that.

    Args:
        image: The picture.
        seed: Its maps.
        method: ``par`` or ``crf``.
        low: The lower power.
        high: The higher power.
        stride: Side of the cells in pixels.

    Returns:
        ``(H, W)`` uint8: 0 background, class index + 1, 255 open.
    """
    maps = seed.full_size()
    if not len(maps):
        return np.zeros(seed.size, np.uint8)
    backgrounds = [background_score(maps, power) for power in (low, high)]
    if method == "par":
        both = _par(image, torch.cat([*backgrounds, maps]))
        scores = [torch.cat([both[index : index + 1], both[2:]]) for index in (0, 1)]
    else:
        scores = [
            dense_crf(np.array(image), torch.cat([background, maps]), PARAMETERS["psa"])
            for background in backgrounds
        ]
    inflated, deflated = (cell_means(s, stride).argmax(0) for s in scores)
    labels = torch.from_numpy(np.append(0, seed.keys + 1))[inflated]
    labels[inflated == 0] = IGNORED
    labels[deflated == 0] = 0
    cells = labels.to(torch.uint8)
    whole = cells.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return whole[: seed.size[0], : seed.size[1]].numpy()


def background_score(maps: Tensor, power: float) -> Tensor:
    """``(1 - strongest map) ** power`` of maps ``(K, h, w)`` in 0..1: ``(1, h, w)``."""
    return (1 - maps.amax(0, keepdim=True)).clamp_min(0) ** power


def cell_means(scores: Tensor, stride: int) -> Tensor:
    """Means of ``(L, H, W)`` over square cells, those at the border over what they have."""
    return F.avg_pool2d(scores[None], stride, ceil_mode=True)[0]


def _par(image: Image.Image, maps: Tensor) -> Tensor:
    """Refine maps ``(K, H, W)`` with the defaults of the refiner."""
    size = (maps.shape[1], maps.shape[2])
    seed = SeedRecord(np.arange(len(maps)), maps.numpy(), size)
    return PAR().refine("", image, seed).full_size()


def _crf_mask(image: Image.Image, mask: np.ndarray, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    values = np.append(0, np.asarray(keys, np.int64) + 1)
    labels = torch.from_numpy(np.searchsorted(values, mask))
    probabilities = label_probabilities(labels, len(values))
    found = dense_crf(np.array(image), probabilities, PARAMETERS["irn_labels"]).argmax(0)
    return values[found.numpy()].astype(np.uint8)
