# python experiments/imagenet_classes.py   writes experiments/imagenet_classes.md
"""LPCAM on a classifier that was never trained for it: ImageNet's 1,000 classes on the cut-outs.

EfficientNet-Lite0 keeps its own head, which is asked in two ways. *One of ImageNet's*: each picture
is labelled with the best-scoring ImageNet class among those that belong to its own class (a bird is
one of ImageNet's 59 birds). *Merged*: a class's row is the mean of the rows of its ImageNet
classes, so that all its pictures teach the same prototypes. Fitted on train, scored on val's masks.
"""

import argparse
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from lpcam import LPCAM
from lpcam.backbones import Backbone, build_backbone
from lpcam.data.cutouts import Cutouts
from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.evaluation import SegmentationScore

# Ranges of ImageNet indices, ends included.
BELONGS = {
    "bird": [(7, 24), (80, 100), (127, 146)],
    "cattle": [(345, 347)],
    "horse": [(339, 340)],
    "bigcat": [(286, 293)],
    "fish": [(0, 6), (389, 397)],
    "car": [(407, 407), (436, 436), (468, 468), (511, 511), (555, 555), (569, 569), (627, 627),
            (654, 654), (656, 656), (717, 717), (751, 751), (779, 779), (817, 817), (864, 864),
            (867, 867), (874, 874)],
    "flower": [(985, 986), (738, 738)],
    "fruit": [(948, 957)],
    "guitar": [(402, 402), (486, 486), (546, 546), (889, 889)],
    "ball": [(429, 430), (522, 522), (574, 574), (722, 722), (768, 768), (805, 805), (852, 852),
             (890, 890)],
}  # fmt: skip


def main() -> None:
    """Fit, score, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", type=Path, help="folder of generated data")
    parser.add_argument("--seeds", default=[0, 1, 2], nargs="+", type=int, help="of the data")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "class .*: no prototype scores above")
    rows = [
        "`python experiments/imagenet_classes.py`",
        "",
        "EfficientNet-Lite0 with ImageNet's weights and head, nothing trained; mIoU on val at the "
        "best threshold, with precision / recall; one view. One of ImageNet's: k=4, "
        "class_score=0.1, and LPCAM is scored only where train shows all of a picture's ImageNet "
        "classes. Merged: class_score=0.5, the rest as by default.",
        "",
        "| data seed | classes | pictures | CAM | LPCAM |",
        "|---|---|---|---|---|",
    ]
    for seed in options.seeds:
        for row in study(Cutouts(options.data / "cutouts", seed=seed)):
            rows.append(f"| {seed} | {' | '.join(row)} |")
    print("\n".join(rows))
    Path(__file__).with_suffix(".md").write_text("\n".join(rows) + "\n")


def study(dataset: Cutouts) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one data set."""
    dataset.prepare()
    backbone = build_backbone("efficientnet_lite0")
    groups = [
        torch.cat([torch.arange(low, high + 1) for low, high in BELONGS[name]])
        for name in dataset.classes
    ]
    network = copy.deepcopy(backbone.network)
    network.classifier = merge_rows(backbone.network.classifier, groups)
    imagenet = LPCAM(backbone.network, k=4, class_score=0.1)
    merged = LPCAM(network, class_score=0.5)

    def best_of_imagenet(picture: Picture, features: Tensor) -> list[int]:
        """For each class of the picture the row that scores best among its own."""
        scores = imagenet.layers.weight @ features.mean((0, 2, 3)) + imagenet.layers.classifier.bias
        return [int(groups[c][scores[groups[c]].argmax()]) for c in picture.labels or ()]

    local, best, own = [], [], []
    for picture, image in read(dataset, "train", backbone):
        features = imagenet.features(image)
        local.append(features[0].permute(1, 2, 0).half().numpy())
        best.append(multi_hot(best_of_imagenet(picture, features), 1000))
        own.append(multi_hot(list(picture.labels or ()), len(groups)))
    imagenet.fit_features(local, np.concatenate(best), progress=False)
    merged.fit_features(local, np.concatenate(own), progress=False)

    every, seen, shared = (Scores(len(groups)) for _ in range(3))
    for picture, image in read(dataset, "val", backbone):
        classes, mask = list(picture.labels or ()), dataset.mask(picture)
        rows = best_of_imagenet(picture, imagenet.features(image))
        maps = imagenet.compare(image, torch.from_numpy(multi_hot(rows, 1000)))
        every.update(maps, rows, classes, mask)
        if set(rows) <= set(imagenet.head.fitted):
            seen.update(maps, rows, classes, mask)
        maps = merged.compare(image, torch.from_numpy(multi_hot(classes, len(groups))))
        shared.update(maps, classes, classes, mask)
    yield "one of ImageNet's", *every.texts()[:2], ""
    yield "one of ImageNet's", *seen.texts()
    yield "merged", *shared.texts()


class Scores:
    """Counts of CAM and LPCAM over the same pictures."""

    def __init__(self, num_classes: int) -> None:
        self.pictures = 0
        self.cam, self.lpcam = SegmentationScore(num_classes), SegmentationScore(num_classes)

    def update(
        self,
        maps: tuple[Tensor, Tensor],
        rows: list[int],
        classes: list[int],
        mask: np.ndarray | None,
    ) -> None:
        """Count one picture, whose classes are mapped by these rows of the classifier."""
        self.pictures += 1
        for counted, own in zip((self.lpcam, self.cam), maps, strict=True):
            counted.update(own[0, rows], classes, mask)

    def texts(self) -> tuple[str, str, str]:
        """Number of pictures, and the scores of CAM and of LPCAM."""
        texts = [str(self.pictures)]
        for counted in (self.cam, self.lpcam):
            result = counted.compute()
            found = (result.miou, result.precision, result.recall)
            texts.append("{:.1f} ({:.1f} / {:.1f})".format(*(100 * v[result.best] for v in found)))
        return texts[0], texts[1], texts[2]


def merge_rows(classifier: nn.Linear, groups: Sequence[Tensor]) -> nn.Linear:
    """A classifier with a row a group: the mean of its classes' rows."""
    merged = nn.Linear(classifier.in_features, len(groups))
    for own, rows in ((merged.weight, classifier.weight), (merged.bias, classifier.bias)):
        own.data = torch.stack([rows.data[group].mean(0) for group in groups])
    return merged


def read(dataset: Cutouts, split: str, backbone: Backbone) -> Iterator[tuple[Picture, Tensor]]:
    """Each picture of a split, and its normalised tensor ``(1, 3, H, W)``."""
    pictures = dataset.pictures(split)
    loader = view_loader(
        pictures,
        len(dataset.classes),
        scales=[1.0],
        flip=False,
        mean=backbone.mean,
        std=backbone.std,
    )
    for picture, batch in zip(pictures, track(loader, split), strict=True):
        yield picture, batch["views"][0]


def multi_hot(rows: list[int], count: int) -> np.ndarray:
    """Labels ``(1, count)`` of one picture."""
    labels = np.zeros((1, count), np.float32)
    labels[0, rows] = 1
    return labels


if __name__ == "__main__":
    main()
