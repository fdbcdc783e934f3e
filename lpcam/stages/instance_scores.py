"""Instances as COCO's results, and their average precision against true boxes and masks."""

from collections.abc import Mapping

import numpy as np

from lpcam.data.dataset import Picture, SegmentationDataset, TrueInstances, open_image
from lpcam.evaluation.instances import Entry, average_precision, region_entry, region_mask
from lpcam.stages.instances import read_instances
from lpcam.storage.store import Stage


def coco_results(dataset: SegmentationDataset, split: str, stage: Stage) -> list[Entry]:
    """The instances of a split as COCO's results, picture by picture, the highest score first."""
    results = []
    for picture in dataset.pictures(split):
        image_id, categories = dataset.coco_ids(picture)
        for entry in read_instances(stage, picture):
            category = categories[entry.pop("label")]
            results.append({"image_id": image_id, "category_id": category, **entry})
    return results


def instance_scores(
    dataset: SegmentationDataset, found: Mapping[str, Mapping[str, Stage]]
) -> dict[str, float]:
    """Average precision of instances.

    Args:
        dataset: Reads the truth.
        found: Instances by name and split.

    Returns:
        By ``<split>/<name>/<metric>`` ``box_ap``, ``box_ap50`` and ``box_ap75`` where true boxes
        are known, and ``mask_ap`` and so on where true masks of objects are.
    """
    metrics: dict[str, float] = {}
    for split in dataset.map_splits:
        boxes: list[Entry] = []
        masks: list[Entry] = []
        unknown: dict[int | str, np.ndarray] = {}
        for picture in dataset.pictures(split):
            boxes += _true_boxes(dataset, picture)
            objects = dataset.instances(picture)
            if objects is None:
                continue
            true_masks = _true_masks(dataset, picture, objects)
            masks += true_masks
            boxes += [entry for entry in true_masks if entry["iscrowd"]]
            if objects.unknown.any():
                unknown[dataset.coco_ids(picture)[0]] = objects.unknown
        for name, by_split in found.items():
            results = coco_results(dataset, split, by_split[split])
            scores = {
                "box": average_precision(boxes, results, "bbox"),
                "mask": average_precision(masks, _known(results, unknown), "segm"),
            }
            metrics |= {
                f"{split}/{name}/{kind}_{metric}": value
                for kind, values in scores.items()
                for metric, value in values.items()
            }
    return metrics


def _true_boxes(dataset: SegmentationDataset, picture: Picture) -> list[Entry]:
    image_id, categories = dataset.coco_ids(picture)
    with open_image(picture.path, decode=False) as image:
        sides = np.array(image.size)
    entries = []
    for label, shares in dataset.boxes(picture).items():
        for box in shares:
            start, end = sides * box[:2], sides * box[2:]
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": categories[label],
                    "iscrowd": 0,
                    "bbox": [*start.tolist(), *(end - start).tolist()],
                    "area": float((end - start).prod()),
                }
            )
    return entries


def _true_masks(
    dataset: SegmentationDataset, picture: Picture, objects: TrueInstances
) -> list[Entry]:
    image_id, categories = dataset.coco_ids(picture)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label],
            "iscrowd": int(crowd),
            **region_entry(mask),
        }
        for label, mask, crowd in zip(objects.labels, objects.masks, objects.crowds, strict=True)
    ]


def _known(results: list[Entry], unknown: Mapping[int | str, np.ndarray]) -> list[Entry]:
    """Results without the pixels of which nobody knows whose they are; one may have no others."""
    known = []
    for entry in results:
        if entry["image_id"] in unknown:
            left = region_mask(entry) & ~unknown[entry["image_id"]]
            if not left.any():
                continue
            entry = {**entry, **region_entry(left)}
        known.append(entry)
    return known
