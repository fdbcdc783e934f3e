"""The stage of an earlier, finer stage's features, which maps propagate by."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lpcam.data.dataset import Picture, fingerprint
from lpcam.data.loaders import ViewBatch, normalized, view_loader
from lpcam.models.backbones import Backbone
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.storage.arrays import read_arrays, stored_record
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


def finer_features(
    store: Path,
    make_trainer: MakeTrainer,
    host: Host,
    pictures: Sequence[Picture],
    *,
    num_workers: int | None,
) -> Stage:
    """Features of each picture at its own size: ``<id>.npz`` with ``stage`` (E, h, w) float16.

    See :meth:`Backbone.stage`; a pass of its own, which ends at that stage.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        host: The trained host.
        pictures: The pictures.
        num_workers: Processes that decode pictures.
    """
    inputs = {"features": host.feature_key, "pictures": fingerprint(pictures)}
    stage = Stage(store, "finer", inputs)
    with stage.build(resume=True, together=True) as folder:
        records = Records(folder) if folder else None
        missing = [p for p in pictures if records and f"{p.id}.npz" not in records]
        if records and missing:
            backbone = host.backbone
            trainer = make_trainer(
                logger=False, callbacks=[_Writer(records)], enable_checkpointing=False
            )
            loader = view_loader(
                missing,
                host.num_classes,
                scales=[1.0],
                flip=False,
                num_workers=num_workers,
                processes=trainer.world_size,
            )
            trainer.predict(_Stage(backbone.fused()), loader, return_predictions=False)
            trainer.strategy.barrier()
    return stage


def read_finer(stage: Stage, image_id: str) -> Tensor:
    """The features of one picture ``(E, h, w)`` float32.

    Raises:
        InputError: The file is missing or damaged.
    """
    with stored_record(stage.records, f"{image_id}.npz") as file:
        return torch.from_numpy(read_arrays(file)["stage"]).float()


class _Stage(pl.LightningModule):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def on_after_batch_transfer(self, batch: ViewBatch, dataloader_idx: int) -> ViewBatch:
        return normalized(batch, self.backbone.mean, self.backbone.std)

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> Tensor:
        return self.backbone.stage(batch["views"][0])


class _Writer(BasePredictionWriter):
    def __init__(self, records: Records) -> None:
        super().__init__("batch")
        self.records = records

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for image_id, features in zip(batch["ids"], prediction, strict=True):
            buffer = io.BytesIO()
            np.savez(buffer, stage=features.half().cpu().numpy())
            self.records.write(f"{image_id}.npz", buffer.getvalue())
