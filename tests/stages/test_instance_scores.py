"""Instances of a tree on disk as COCO's results, scored against what the tree says."""

import json
from pathlib import Path

import numpy as np
import pytest

from lpcam.data.voc import VOC
from lpcam.evaluation.instances import region_entry
from lpcam.stages.instance_scores import coco_results, instance_scores
from lpcam.storage.records import Records
from lpcam.storage.store import Stage
from tests.data.trees import Sample, draw_samples, write_mask, write_voc

pytest.importorskip("pycocotools", reason="needs the extra 'coco'")
NAMES = ("cat", "dog", "fox")


def box_of(sample: Sample, at: int) -> np.ndarray:
    left, top, right, bottom = sample.objects[at][1]
    mask = np.zeros(sample.image.size[::-1], bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def samples() -> list[Sample]:
    """One object a picture, so that none hides another."""
    drawn = draw_samples(NAMES, 6, 0)
    return [Sample(sample.id, sample.image, sample.objects[:1]) for sample in drawn]


@pytest.fixture
def tree(tmp_path: Path, samples: list[Sample]) -> VOC:
    write_voc(tmp_path / "tree", {"train": samples}, NAMES)
    for sample in samples:
        xml = tmp_path / "tree" / "Annotations" / f"{sample.id}.xml"
        left, top, right, bottom = sample.objects[0][1]
        box = (
            f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        )
        xml.write_text(xml.read_text().replace("</object>", box))
    return VOC(tmp_path / "tree", tree_classes=NAMES, map_splits=["train"])


def stage_of(root: Path, entries: dict[str, list[dict]]) -> Stage:
    stage = Stage(root, "instances", {"entries": entries})
    with stage.build() as folder:
        assert folder
        records = Records(folder)
        for name, found in entries.items():
            records.write(f"{name}.json", json.dumps(found).encode())
    return stage


def perfect(samples: list[Sample]) -> dict[str, list[dict]]:
    return {
        sample.id: [
            {
                "label": NAMES.index(sample.objects[0][0]),
                "score": 0.5,
                **region_entry(box_of(sample, 0)),
            }
        ]
        for sample in samples
    }


def test_boxes_alone_are_scored_where_no_masks_are(
    tmp_path: Path, tree: VOC, samples: list[Sample]
) -> None:
    stage = stage_of(tmp_path, perfect(samples))
    scores = instance_scores(tree, {"instances": {"train": stage}})
    names = {f"train/instances/box_{metric}" for metric in ("ap", "ap50", "ap75")}
    assert scores.keys() == names
    assert list(scores.values()) == pytest.approx([1, 1, 1])
    results = coco_results(tree, "train", stage)
    assert [entry["image_id"] for entry in results] == [sample.id for sample in samples]
    assert results[0]["category_id"] == NAMES.index(samples[0].objects[0][0]) + 1


def test_masks_are_scored_without_what_nobody_knows(
    tmp_path: Path, tree: VOC, samples: list[Sample]
) -> None:
    entries = perfect(samples)
    for sample in samples:
        objects = box_of(sample, 0).astype(np.uint8)
        spare = np.argwhere(objects == 0)[:60]  # more than would do for a perfect overlap
        objects[tuple(spare.T)] = 255
        write_mask(tree.root / "SegmentationObject" / f"{sample.id}.png", objects)
        (right,) = entries[sample.id]
        wider = region_entry(objects > 0)
        unknown = region_entry(objects == 255)
        label = right["label"]
        entries[sample.id] = [
            {"label": label, "score": 0.9, **unknown},
            {"label": label, "score": 0.5, **wider},
        ]
    stage = stage_of(tmp_path, entries)
    scores = instance_scores(tree, {"instances": {"train": stage}})
    assert scores["train/instances/mask_ap"] == pytest.approx(1)
    assert scores["train/instances/box_ap"] < 0.5
