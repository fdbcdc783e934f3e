"""Instances of a tree on disk as COCO's results, scored against what the tree says."""

import json
from pathlib import Path

import numpy as np
import pytest

from lpcam.data.coco import COCO
from lpcam.data.voc import VOC
from lpcam.evaluation.instances import region_entry
from lpcam.stages.instance_scores import coco_results, instance_scores
from lpcam.storage.records import Records
from lpcam.storage.store import Stage
from tests.data.trees import Sample, draw_samples, write_coco, write_mask, write_voc

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


def test_pycocotools_finds_the_same_in_the_files(tmp_path: Path, capsys) -> None:
    """The results as they are written, read back beside COCO's own file, crowds and all."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    drawn = draw_samples(NAMES, 9, 1)
    write_coco(tmp_path, {"train": drawn}, {2: "cat", 13: "dog", 90: "fox"})
    path = tmp_path / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    for item in content["annotations"]:
        corners = np.reshape(item["segmentation"], (-1, 2))
        sides = np.ptp(corners, axis=0)
        item |= {"bbox": [*corners.min(0).tolist(), *sides.tolist()], "area": int(sides.prod())}
        item["id"] += 1
    content["annotations"][3]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    tree = COCO(tmp_path, tree_classes=NAMES, map_splits=["train"])
    rng = np.random.default_rng(0)
    entries = {}
    for sample in drawn:
        masks = [
            np.roll(box_of(sample, at), rng.integers(-3, 4), 1) for at in range(len(sample.objects))
        ]
        masks.append(np.roll(masks[0], 9, 0))
        entries[sample.id] = [
            {
                "label": int(rng.integers(3)) if rng.random() < 0.3 else NAMES.index(name),
                "score": float(rng.random()),
                **region_entry(mask),
            }
            for mask, (name, _) in zip(masks, [*sample.objects, sample.objects[0]], strict=True)
        ]
    stage = stage_of(tmp_path, entries)
    scores = instance_scores(tree, {"instances": {"train": stage}})
    (tmp_path / "results.json").write_text(json.dumps(coco_results(tree, "train", stage)))
    truth = coco.COCO(str(path))
    read = truth.loadRes(str(tmp_path / "results.json"))
    for kind, name in (("segm", "mask"), ("bbox", "box")):
        expected = evaluation.COCOeval(truth, read, kind)
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
        for place, metric in enumerate(("ap", "ap50", "ap75")):
            assert scores[f"train/instances/{name}_{metric}"] == expected.stats[place]
    assert 0.05 < scores["train/instances/mask_ap"] < 0.95
