"""Tiny data sets on disk: the same pictures in the layouts of VOC, COCO and folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """A picture with rectangular objects.

    Attributes:
        id: Its name.
        image: Its pixels, in any mode that JPEG can hold.
        objects: Class name and box (left, top, right, bottom; half-open) of each, later on top.
    """

    id: str
    image: Image.Image
    objects: list[tuple[str, Box]] = field(default_factory=list)

    def labels(self, classes: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({classes.index(name) for name, _ in self.objects}))

    def mask(self, classes: Sequence[str]) -> np.ndarray:
        mask = np.zeros(self.image.size[::-1], np.uint8)
        for name, (left, top, right, bottom) in self.objects:
            mask[top:bottom, left:right] = classes.index(name) + 1
        return mask


def draw_samples(
    classes: Sequence[str],
    count: int,
    seed: int,
    *,
    sizes: Sequence[int] = (31, 40, 47),
    prefix: str = "",
) -> list[Sample]:
    """Noise with one or two rectangles, whose brightness tells the class; classes go round."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        height, width = (int(side) for side in rng.choice(sizes, 2))
        pixels = rng.integers(0, 40, (height, width, 3), np.uint8)
        objects = []
        for step in range(1 + number % 2):
            label = (number + step) % len(classes)
            left, top = (int(rng.integers(0, side // 2)) for side in (width, height))
            right, bottom = left + width // 2, top + height // 2
            pixels[top:bottom, left:right] += np.uint8(60 + 150 * label // len(classes))
            objects.append((classes[label], (left, top, right, bottom)))
        samples.append(Sample(f"{prefix}{number:03d}", Image.fromarray(pixels), objects))
    return samples


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a palette PNG with arbitrary colours."""
    image = Image.fromarray(mask)
    image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_annotation(path: Path, objects: Sequence[tuple[str, bool]]) -> None:
    """Write a VOC annotation from names and whether they are difficult."""
    items = "".join(
        f"<object><name>{name}</name><part><name>head</name></part>"
        f"<difficult>{int(difficult)}</difficult></object>"
        for name, difficult in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{items}</annotation>")


def write_voc(root: Path, splits: Mapping[str, Sequence[Sample]], classes: Sequence[str]) -> Path:
    """Write a VOC tree; a picture may be in several splits."""
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for split, samples in splits.items():
        (lists / f"{split}.txt").write_text("".join(f"{sample.id}\n" for sample in samples))
        for sample in samples:
            sample.image.save(root / "JPEGImages" / f"{sample.id}.jpg", quality=95)
            write_mask(root / "SegmentationClass" / f"{sample.id}.png", sample.mask(classes))
            objects = [(name, False) for name, _ in sample.objects]
            write_annotation(root / "Annotations" / f"{sample.id}.xml", objects)
    return root


def rectangle(box: Box) -> list[list[int]]:
    """A box as a COCO polygon."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's uncompressed RLE: lengths of runs down the columns, zeros first."""
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if bool(pixel) != value:
            counts.append(0)
            value = 1 - value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def write_coco(
    root: Path,
    splits: Mapping[str, Sequence[Sample]],
    categories: Mapping[int, str],
    *,
    year: int = 2014,
) -> Path:
    """Write a COCO tree with rectangles as polygons; category ids may have gaps."""
    ids = {name: category for category, name in categories.items()}
    for split, samples in splits.items():
        folder = root / f"{split}{year}"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number, sample in enumerate(samples, 1):
            sample.image.save(folder / f"{sample.id}.jpg", quality=95)
            width, height = sample.image.size
            record = {"file_name": f"{sample.id}.jpg", "height": height, "width": width}
            images.append({"id": number, **record})
            annotations += [
                {"image_id": number, "category_id": ids[name], "segmentation": rectangle(box)}
                for name, box in sample.objects
            ]
        content = {
            "images": images,
            "annotations": [{"id": i, "iscrowd": 0, **item} for i, item in enumerate(annotations)],
            "categories": [{"id": i, "name": name} for i, name in categories.items()],
        }
        write_instances(root, content, split, year=year)
    return root


def write_instances(root: Path, content: Any, split: str = "train", *, year: int = 2014) -> Path:
    path = root / "annotations" / f"instances_{split}{year}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_folder(
    root: Path, splits: Mapping[str, Sequence[Sample]], classes: Sequence[str]
) -> Path:
    """Write a tree for dataset=folder, with a mask for each picture."""
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    rows = ["id,split,labels"]
    for split, samples in splits.items():
        for sample in samples:
            sample.image.save(root / "images" / f"{sample.id}.jpg", quality=95)
            write_mask(root / "masks" / f"{sample.id}.png", sample.mask(classes))
            names = dict.fromkeys(name for name, _ in sample.objects)
            rows.append(f"{sample.id},{split},{' '.join(names)}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root
