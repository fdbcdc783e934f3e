"""The pass of ``infer.py`` over pictures beside the bare forward passes of the same views.

The pass reads JPEG files, scales them, runs the network, makes CAM, LPCAM and LPCAM without context
of all scales and mirror images, and writes records and features; the forward passes get tensors.
Both run the network as inference does, with BatchNorm folded into convolutions.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from experiments.benchmarks.harness import Options, Row, ratio, rounds, section, timed_rows
from lpcam.data.dataset import Picture
from lpcam.data.loaders import view_loader
from lpcam.data.transforms import normalize_bytes
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.models.host import Host
from lpcam.prototypes.maps import MapSetting
from lpcam.stages.maps import Inference, maps

CLASSES = 20
SCALES = (0.5, 1.0, 1.5, 2.0)  # of conf/inference/default.yaml
WORKERS = None  # of conf/infer.yaml: one on the CPU
PASS, FORWARD = "infer.py's pass", "forward only"


def pictures(folder: Path, count: int, size: tuple[int, int]) -> list[Picture]:
    """JPEG files of smooth random colours, two classes each, beside one another in a folder."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
        path = folder / f"{index}.jpg"
        small.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        labels = tuple(sorted(rng.choice(CLASSES, 2, replace=False).tolist()))
        found.append(Picture(str(index), path, labels))
    return found


def trainer_maker(options: Options, folder: Path) -> Callable[..., pl.Trainer]:
    """Lightning's trainer as ``conf/trainer`` has it, in single precision."""
    return functools.partial(
        pl.Trainer,
        accelerator="cpu" if options.device == "cpu" else "gpu",
        devices=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )


def settings(dim: int) -> dict[str, MapSetting]:
    """What a run with its defaults makes: CAM, LPCAM, and LPCAM without context."""
    directions = torch.randn(2, CLASSES, dim)
    return {
        "cam": MapSetting(),
        "lpcam": MapSetting(directions[0]),
        "lpcam_class": MapSetting(directions[1]),
    }


def whole_pass(
    host: Host, chosen: list[Picture], make_trainer: Callable[..., pl.Trainer], folder: Path
) -> Callable[[], None]:
    """A function that makes all maps, each time with a store of its own."""
    made = settings(host.backbone.dim)
    stores = itertools.count()

    def method() -> None:
        store = folder / f"store{next(stores)}"
        inference = Inference(SCALES, flip=True)
        maps(store, make_trainer, host, chosen, made, inference, num_workers=WORKERS)

    return method


def forward_only(host: Host, chosen: list[Picture], options: Options) -> Callable[[], None]:
    """A function that runs the network on all views of the pictures, which are there as tensors."""
    backbone = host.for_inference().backbone.to(options.device)
    loader = view_loader(chosen, CLASSES, scales=SCALES, flip=True)
    views: list[Any] = [
        normalize_bytes(view.to(options.device), backbone.mean, backbone.std)
        for batch in loader
        for view in batch["views"]
    ]

    def method() -> None:
        with torch.inference_mode():
            for view in views:
                backbone(torch.cat([view, view.flip(3)]))

    return method


def table(options: Options) -> list[Row]:
    """EfficientNet-Lite0, where what is not the network weighs most, and ResNet-50."""
    sizes = {"efficientnet_lite0": 16, "resnet50": 2}
    if options.quick:
        sizes = {"efficientnet_lite0": 2}
    return [_of(name, count, options) for name, count in sizes.items()]


def _of(name: str, count: int, options: Options) -> Row:
    backbone = build_backbone(name, None)
    host = Classifier(backbone, CLASSES).eval()
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        chosen = pictures(folder, count, (80, 60) if options.quick else (500, 375))
        make_trainer = trainer_maker(options, folder)
        methods = {
            FORWARD: forward_only(host, chosen, options),
            PASS: whole_pass(host, chosen, make_trainer, folder),
        }
        seconds = rounds(methods, 3, warm_up=1, settle=options.settle)
    rows = timed_rows(seconds, FORWARD)
    for row in rows:
        row |= {"rate": count / row["median"], "pictures": count}
    text = (
        f"{count} pictures of 500x375 pixels, scales {', '.join(map(str, SCALES))} with mirror "
        f"images, random weights. The pass takes "
        f"{ratio(seconds[PASS], seconds[FORWARD]):.3f} times as long as its network alone."
    )
    return section(f"Whole pass, {name}", text, rows, control=seconds[FORWARD])
