"""A tiny data set with maps, and what training needs, shared by the tests of learnt refiners."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lpcam.data.dataset import Picture
from lpcam.data.shapes import Shapes
from lpcam.models.backbones import Backbone, build_backbone
from lpcam.refiners.base import TrainedRefiner
from lpcam.seeds.record import SeedRecord, grid_size


@dataclass(frozen=True)
class Task:
    """Pictures, and maps as an uncertain classifier would make them."""

    dataset: Shapes
    pictures: list[Picture]

    def seed(self, picture: Picture) -> SeedRecord:
        mask = self.dataset.mask(picture)
        assert mask is not None
        assert picture.labels is not None
        places = [
            np.minimum(np.arange(cells) * 4 + 2, side - 1)
            for cells, side in zip(grid_size(mask.shape), mask.shape, strict=True)
        ]
        coarse = mask[np.ix_(*places)]
        rng = np.random.default_rng(picture.labels[0])
        noise = rng.uniform(-0.3, 0.3, (len(picture.labels), *coarse.shape))
        present = np.stack([coarse == label + 1 for label in picture.labels])
        maps = np.clip(np.where(present, 0.8, 0.2) + noise, 0, 1)
        return SeedRecord(np.array(picture.labels), maps.astype(np.float16), mask.shape)


def make_task(root: Path, count: int = 8) -> Task:
    dataset = Shapes(root, train=count, val=1, sizes=(64, 76))
    dataset.prepare()
    return Task(dataset, dataset.pictures("train"))


def tiny_backbone() -> Backbone:
    torch.manual_seed(3)
    return build_backbone("test_resnet", None)


class Losses(pl.Callback):
    """Keeps the loss of each step, and ends the process's work before a given one."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.losses: list[float] = []
        self.stop_before = stop_before

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.stop_before:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def trainer_maker(*further: pl.Callback) -> Callable[..., pl.Trainer]:
    def make(callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*further, *callbacks],
            **options,
        )

    return make


def fit(
    refiner: TrainedRefiner,
    folder: Path,
    task: Task,
    *callbacks: pl.Callback,
    backbone: Backbone | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(0, verbose=False)
    refiner.fit(
        folder,
        task.pictures,
        task.seed,
        backbone or tiny_backbone(),
        trainer_maker(*callbacks),
        num_workers=0,
    )
