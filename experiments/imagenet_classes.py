# python experiments/imagenet_classes.py   writes experiments/imagenet_classes.md
"""LPCAM on a classifier that was never trained for it: ImageNet's 1,000 classes on the cut-outs.

EfficientNet-Lite0 keeps its own head, which is asked in two ways. *One of ImageNet's*: each picture
is labelled with the best-scoring ImageNet class among those that belong to its own class (a bird is
one of ImageNet's 59 birds). *Merged*: a class's row is the mean of the rows of its ImageNet
classes, so that all its pictures teach the same prototypes. Fitted on train, scored on val's masks.
"""

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from lpcam import LPCAM
from lpcam.backbones import Backbone, build_backbone
from lpcam.data.cutouts import Cutouts
from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.evaluation import SegmentationScore
from lpcam.views import SINGLE_VIEW, Views

SIX_VIEWS: Views = tuple(itertools.product((0.5, 1.0, 1.5), (False, True)))

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

# A picture, its normalised tensor, and the classifier's rows that stand for its classes.
Example = tuple[Picture, Tensor, list[int]]


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
        "EfficientNet-Lite0 with ImageNet's weights and head, nothing trained. mIoU on val at the "
        "best threshold, with precision / recall. One of ImageNet's: k=4, class_score=0.1; where "
        "pictures are fewer, those are left out whose ImageNet class train does not show. Merged: "
        "class_score=0.5, the rest as by default.",
        "",
        "| data seed | classes | views | pictures | CAM | LPCAM |",
        "|---|---|---|---|---|---|",
    ]
    for seed in options.seeds:
        for row in study(Cutouts(options.data / "cutouts", seed=seed)):
            rows.append(f"| {seed} | {' | '.join(row)} |")
    print("\n".join(rows))
    Path(__file__).with_suffix(".md").write_text("\n".join(rows) + "\n")


def study(dataset: Cutouts) -> Iterator[list[str]]:
    """Rows of the table for one data set."""
    dataset.prepare()
    backbone = build_backbone("efficientnet_lite0").eval()
    groups = [
        torch.cat([torch.arange(low, high + 1) for low, high in BELONGS[name]])
        for name in dataset.classes
    ]

    def best_of_imagenet(picture: Picture, image: Tensor) -> list[int]:
        with torch.no_grad():
            scores = backbone.network(image)[0]
        return [int(groups[c][scores[groups[c]].argmax()]) for c in picture.labels or ()]

    merged = copy.deepcopy(backbone.network)
    merged.classifier = merge_rows(backbone.network.classifier, groups)
    ways: list[tuple[str, LPCAM, Callable[[Picture, Tensor], list[int]]]] = [
        ("one of ImageNet's", LPCAM(backbone.network, k=4, class_score=0.1), best_of_imagenet),
        ("merged", LPCAM(merged, class_score=0.5), lambda picture, _: list(picture.labels or ())),
    ]
    for name, cam, choose in ways:
        train = examples(dataset, "train", backbone, choose)
        cam.fit(((image, multi_hot(rows, cam)) for _, image, rows in train), progress=False)
        val = list(examples(dataset, "val", backbone, choose))
        mapped = [example for example in val if set(example[2]) <= set(cam.head.fitted)]
        for views in (SINGLE_VIEW, SIX_VIEWS):
            if len(mapped) < len(val):
                everywhere = score(dataset, cam, val, views)[1]
                yield [name, str(len(list(views))), str(len(val)), everywhere, ""]
            lpcam, plain = score(dataset, cam, mapped, views)
            yield [name, str(len(list(views))), str(len(mapped)), plain, lpcam]


def merge_rows(classifier: nn.Linear, groups: Sequence[Tensor]) -> nn.Linear:
    """A classifier with a row a group: the mean of its classes' rows."""
    merged = nn.Linear(classifier.in_features, len(groups))
    for own, rows in ((merged.weight, classifier.weight), (merged.bias, classifier.bias)):
        own.data = torch.stack([rows.data[group].mean(0) for group in groups])
    return merged


def examples(
    dataset: Cutouts,
    split: str,
    backbone: Backbone,
    choose: Callable[[Picture, Tensor], list[int]],
) -> Iterator[Example]:
    """Read a split."""
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
        yield picture, batch["views"][0], choose(picture, batch["views"][0])


def multi_hot(rows: list[int], cam: LPCAM) -> Tensor:
    """Labels ``(1, C)`` of one picture."""
    return torch.zeros(1, len(cam.classes)).index_fill_(1, torch.tensor(rows), 1)


def score(dataset: Cutouts, cam: LPCAM, shown: Sequence[Example], views: Views) -> tuple[str, str]:
    """Scores of LPCAM and of CAM as text."""
    counted = [SegmentationScore(len(dataset.classes)) for _ in range(2)]
    for picture, image, rows in track(shown, "maps"):
        both = cam.compare(image, multi_hot(rows, cam), views=views)
        for own, maps in zip(counted, both, strict=True):
            own.update(maps[0, rows], list(picture.labels or ()), dataset.mask(picture))
    texts = []
    for own in counted:
        result = own.compute()
        best = result.best
        values = [100 * v[best] for v in (result.miou, result.precision, result.recall)]
        texts.append("{:.1f} ({:.1f} / {:.1f})".format(*values))
    return texts[0], texts[1]


if __name__ == "__main__":
    main()
