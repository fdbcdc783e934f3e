# python experiments/video.py RUN CKPT   a run of infer.py and its classifier; writes video.md
"""Maps of a video: cut-outs that move over photos, with exact masks, frame by frame and together.

Each clip shows one class of val, an object that crosses a background while brightness and noise
change from frame to frame. Maps are of one view. Flicker is the mean change of the object's IoU
from a frame to the next, at the background score that is best over all clips.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.progress import track
from torch import Tensor

from lpcam.data.cutouts import Cutouts
from lpcam.data.transforms import normalize
from lpcam.evaluation import SegmentationScore
from lpcam.explain.command import load
from lpcam.programs.build import build

SIZE, FRAMES = (256, 320), 12
WAYS = {
    "LPCAM": {},
    "with the step": {"propagate": 3.0},
    "1 frame before and after": {"propagate": 3.0, "frames": 1},
    "2 frames": {"propagate": 3.0, "frames": 2},
    "4 frames": {"propagate": 3.0, "frames": 4},
}


def main() -> None:
    """Make the clips, map them in each way, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on dataset=cutouts")
    parser.add_argument("ckpt", type=Path, help="the checkpoint of its classifier")
    parser.add_argument("--clips", default=1, type=int, help="of each class")
    options = parser.parse_args()
    config = OmegaConf.load(options.run / "config.yaml")
    cam, backbone = load(
        config.backbone.name, "imagenet", options.ckpt, options.run / "prototypes.safetensors"
    )
    dataset: Cutouts = build(config.dataset)
    dataset.prepare()
    classes = dataset.classes
    scores = {way: SegmentationScore(len(classes)) for way in WAYS}
    kept: dict[str, list[tuple[int, Tensor, np.ndarray]]] = {way: [] for way in WAYS}
    clips = [(label, number) for label in range(len(classes)) for number in range(options.clips)]
    for label, number in track(clips, "Clips"):
        pictures, masks = make_clip(dataset, label, np.random.default_rng([label, number]))
        images = torch.stack([normalize(p, backbone.mean, backbone.std) for p in pictures])
        labels = torch.eye(len(classes))[[label] * FRAMES]
        for way, settings in WAYS.items():
            maps = cam(images, labels, **settings)[:, label].cpu()
            for one, mask in zip(maps, masks, strict=True):
                scores[way].update(one[None], [label], mask)
            kept[way].append((label, maps, masks))
    rows = []
    for way, score in scores.items():
        result = score.compute()
        threshold = float(result.thresholds[result.best])
        ious = [[iou(one > threshold, mask) for one, mask in zip(m, masks, strict=True)]
                for _, m, masks in kept[way]]  # fmt: skip
        flicker = float(np.abs(np.diff(np.array(ious), axis=1)).mean())
        rows.append(
            f"| {way} | {100 * result.miou[result.best]:.1f} | {100 * np.mean(ious):.1f} "
            f"| {100 * flicker:.1f} |"
        )
    lines = [
        "`python experiments/video.py RUN CKPT`: "
        f"{len(clips)} clips of {FRAMES} frames from the cut-outs of val, in percent.",
        "",
        "| maps | mIoU | mean IoU of the object | flicker |",
        "|---|---|---|---|",
        *rows,
    ]
    target = Path(__file__).with_suffix(".md")
    target.write_text("\n".join(lines) + "\n")
    print(target.read_text())


def make_clip(
    dataset: Cutouts, label: int, rng: np.random.Generator
) -> tuple[list[Image.Image], np.ndarray]:
    """Frames of an object that moves in a straight line, and their masks ``(T, H, W)`` uint8."""
    background = dataset._background("val", label, SIZE, rng).astype(np.float32)
    sprite = dataset._sprite("val", label, int(rng.integers(90, 150)), rng)
    free = np.array(SIZE) - sprite.alpha.shape
    start, end = rng.uniform(0, free), rng.uniform(0, free)
    pictures, masks = [], np.zeros((FRAMES, *SIZE), np.uint8)
    for frame, mask in enumerate(masks):
        top, left = (start + (end - start) * frame / (FRAMES - 1)).astype(int)
        window = slice(top, top + sprite.alpha.shape[0]), slice(left, left + sprite.alpha.shape[1])
        shown = background.copy()
        shown[window] += sprite.alpha[..., None] * (sprite.colour - shown[window])
        shown = shown * rng.uniform(0.9, 1.1) + rng.normal(0, 6, shown.shape)
        pictures.append(Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8)))
        mask[window][sprite.solid] = label + 1
    return pictures, masks


def iou(found: Tensor, mask: np.ndarray) -> float:
    """Intersection over union of an object's region."""
    true = torch.from_numpy(mask > 0)
    return float((found & true).sum() / (found | true).sum().clamp_min(1))


if __name__ == "__main__":
    main()
