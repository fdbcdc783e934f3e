# python experiments/imagenet_classes.py   writes experiments/imagenet_classes.md
"""LPCAM on a classifier that was never trained for it: ImageNet's 1,000 classes on the cut-outs.

EfficientNet-Lite0 keeps its own head. Each picture is labelled with the best-scoring ImageNet class
among those that belong to its own class (a bird is one of ImageNet's 59 birds); prototypes are
fitted on train by those labels, and the maps of val are scored against its masks. One view.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from lpcam import LPCAM
from lpcam.data.cutouts import Cutouts
from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.data.transforms import normalize_bytes
from lpcam.evaluation import SegmentationScore
from lpcam.models.backbones import build_backbone

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
    parser.add_argument("--class-score", default=0.1, type=float)
    options = parser.parse_args()
    dataset = Cutouts(options.data / "cutouts")
    dataset.prepare()
    backbone = build_backbone("efficientnet_lite0").eval()
    model = backbone.network
    indices = [
        torch.cat([torch.arange(low, high + 1) for low, high in BELONGS[name]])
        for name in dataset.classes
    ]

    def batches(split: str) -> Iterator[tuple[Picture, torch.Tensor, list[int]]]:
        """Each picture with the ImageNet class that stands for each of its own classes."""
        pictures = dataset.pictures(split)
        loader = view_loader(pictures, len(indices), scales=[1.0], flip=False)
        for picture, batch in zip(pictures, track(loader, split), strict=True):
            image = normalize_bytes(batch["views"][0], backbone.mean, backbone.std)
            with torch.no_grad():
                scores = model(image)[0]
            shown = [int(indices[c][scores[indices[c]].argmax()]) for c in picture.labels or ()]
            yield picture, image, shown

    def multi_hot(classes: list[int]) -> torch.Tensor:
        return torch.zeros(1, 1000).index_fill_(1, torch.tensor(classes), 1)

    warnings.filterwarnings("ignore", ".*no prototype scores above")
    cam = LPCAM(model, k=4, class_score=options.class_score)
    cam.fit(((image, multi_hot(shown)) for _, image, shown in batches("train")), progress=False)
    fitted = set(cam.head.fitted)

    names = ("CAM", "LPCAM")
    scores = {name: SegmentationScore(len(indices)) for name in names}
    left_out = 0
    for picture, image, shown in batches("val"):
        if not fitted.issuperset(shown):  # its ImageNet class was not seen in train
            left_out += 1
            continue
        lpcam, plain = cam.compare(image, multi_hot(shown))
        for name, maps in (("CAM", plain), ("LPCAM", lpcam)):
            scores[name].update(maps[0, shown], list(picture.labels or ()), dataset.mask(picture))
    rows = [
        "`python experiments/imagenet_classes.py`",
        "",
        f"EfficientNet-Lite0 with its own 1,000-class head, nothing trained; k=4, class_score="
        f"{options.class_score}; {len(fitted)} ImageNet classes fitted on train; val, one view, "
        f"{left_out} pictures left out whose ImageNet class does not occur in train.",
        "",
        "| | mIoU | at threshold | precision | recall |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        result = scores[name].compute()
        best = result.best
        rows.append(
            f"| {name} | {100 * result.miou[best]:.1f} | {result.thresholds[best]:.2f} | "
            f"{100 * result.precision[best]:.1f} | {100 * result.recall[best]:.1f} |"
        )
    print("\n".join(rows))
    Path(__file__).with_suffix(".md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
