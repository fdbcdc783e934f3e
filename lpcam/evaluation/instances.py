"""Scores of instances: COCO's average precision, as pycocotools computes it."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np

from lpcam.errors import InputError

Entry = dict[str, Any]


def coco_tools() -> ModuleType:
    """The package pycocotools, with its modules.

    Raises:
        InputError: It is missing.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise InputError(
            "pycocotools: not installed, needed for instances=true; pip install 'lpcam[coco]'"
        ) from error
    return pycocotools


def region_entry(mask: np.ndarray) -> Entry:
    """Where an object is, as COCO's files say it.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        ``segmentation``, run-length encoded, ``bbox`` (left, top, width and height in pixels) and
        ``area``.
    """
    tools = coco_tools().mask
    code = tools.encode(np.asfortranarray(mask, np.uint8))
    return {
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        "bbox": tools.toBbox(code).tolist(),
        "area": int(tools.area(code)),
    }


def region_mask(entry: Mapping[str, Any]) -> np.ndarray:
    """The mask ``(H, W)`` bool of an entry that has a ``segmentation``."""
    mask: np.ndarray = coco_tools().mask.decode(entry["segmentation"]) > 0
    return mask


def average_precision(
    truth: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    kind: Literal["segm", "bbox"],
) -> dict[str, float]:
    """Average precision of instances by the overlap of their masks, or of their boxes.

    Pictures without any true object are left out, for nothing may be known of them.

    Args:
        truth: The true objects: ``image_id``, ``category_id``, ``iscrowd``, ``bbox``, ``area``, and
            for masks ``segmentation``.
        found: What was found, likewise, ``score`` instead of ``iscrowd``.
        kind: Which of the two.

    Returns:
        In 0..1 ``ap``, the mean over overlaps of 0.5 to 0.95, ``ap50`` and ``ap75``; nothing
        without a true object.
    """
    tools = coco_tools()
    categories = sorted({item["category_id"] for item in truth if not item["iscrowd"]})
    if not categories:
        return {}
    images = {item["image_id"] for item in truth}
    indices = []
    for entries in (truth, found):
        index = tools.coco.COCO()
        index.dataset = {
            "images": [{"id": image, "height": 0, "width": 0} for image in images],
            "categories": [{"id": category} for category in categories],
            "annotations": [
                {"iscrowd": 0, **entry, "id": number}
                for number, entry in enumerate(entries, 1)  # a match is noted by its id, 0 is none
                if entry["image_id"] in images and entry["category_id"] in categories
            ],
        }
        indices.append(index)
    with contextlib.redirect_stdout(io.StringIO()):  # where it tells its progress
        for index in indices:
            index.createIndex()
        scores = tools.cocoeval.COCOeval(*indices, kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return dict(zip(("ap", "ap50", "ap75"), scores.stats.tolist(), strict=False))
