"""Lightning callbacks that turn predictions into files as they come: local features, and maps.

Each picture's record is written whole under its own name, so that a killed run loses at most the
pictures of a few batches and several processes can share the work.
"""

import io
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lpcam.data.loaders import ViewBatch
from lpcam.errors import InputError
from lpcam.functional import normalize_maps
from lpcam.models.host import Host
from lpcam.prototypes.maps import HostViews, MapMaker, sampled_maps
from lpcam.seeds.record import SeedRecord, seed_bytes
from lpcam.stages.finer import read_finer
from lpcam.storage.parallel import Beside
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


class FeatureCallback(BasePredictionWriter):
    """Write each picture's local features at its own size, for clustering and for the head.

    A record ``<id>.npz`` holds ``pooled`` (D,) float32, the mean feature, and ``local`` (h, w, D)
    float16 unless left out. It may also hold ``maps`` (L, h, w) float32 in 0..1, the host's own of
    the picture's classes in ascending order.

    The first scale of the pictures must be 1; it gives the features.

    Args:
        records: Where they go.
        local: Whether to write the local features too.
        maps: Which maps to write: of the ``single_view`` that gives the features, or over all
            scales and mirror images, :func:`~lpcam.prototypes.maps.sampled_maps`; None for none.
    """

    def __init__(self, records: Records, *, local: bool, maps: str | None = None) -> None:
        super().__init__("batch")
        self.records = records
        self.local = local
        self.maps = maps

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[HostViews],
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        plain = prediction[0].features[0]
        for place, (image_id, features) in enumerate(zip(batch["ids"], plain, strict=True)):
            arrays = {"pooled": features.mean((1, 2)).float().cpu().numpy()}
            if self.local:
                arrays["local"] = features.permute(1, 2, 0).half().cpu().numpy()
            if self.maps:
                shown = batch["labels"][place].bool()
                scales = [v.maps[:, place, shown] for v in prediction if v.maps is not None]
                if self.maps == "multi_scale":
                    maps = sampled_maps(scales, batch["size"])
                else:
                    maps = normalize_maps(scales[0][0])
                arrays["maps"] = maps.float().cpu().numpy()
            check_finite(image_id, *arrays.values())
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            self.records.write(f"{image_id}.npz", buffer.getvalue())


class LPCAMCallback(BasePredictionWriter):
    """Write the maps of each picture's classes, for any number of settings from one forward pass.

    Args:
        maker: Makes the maps.
        records: Where the ``<id>.npz`` of each of its settings go.
        kept: Where the features of each picture go that LPCAM reads, a record ``<id>.npz`` with an
            array ``(D, h, w)`` float16 a scale in the order of the scales; None for nowhere.
        finer: The stage of the features that maps propagate by; None where none does.
    """

    def __init__(
        self,
        maker: MapMaker,
        records: Sequence[Records],
        *,
        kept: Records | None = None,
        finer: Stage | None = None,
    ) -> None:
        super().__init__("batch")
        self.maker = maker
        self.records = records
        self.kept = kept
        self.finer = finer
        # The next forward pass does not wait for files to be compressed and written.
        self._writing = Beside()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the directions to where the features will be."""
        self.maker.move(pl_module.device)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[HostViews],
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        assert isinstance(pl_module, Host)
        labels = batch["labels"].bool()
        stages = None
        if self.finer:
            stages = [read_finer(self.finer, i).to(pl_module.device) for i in batch["ids"]]
        maps = self.maker(prediction, labels, batch["size"], pl_module.finish, stages)
        if self.kept is not None:
            halves = [views.features.mean(0).half().cpu().numpy() for views in prediction]
            self._writing.call(_write_features, self.kept, batch["ids"], halves)
        halved = [found.half().cpu() for found in maps]
        size = batch["size"]
        self._writing.call(write_maps, self.records, batch["ids"], halved, labels.cpu(), size)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last files."""
        self._writing.finish()


def check_finite(image_id: str, *arrays: np.ndarray) -> None:
    """Make sure that neither NaN nor infinity gets into a file.

    Raises:
        InputError: One would.
    """
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError(
            f"{image_id}: features or maps are no finite numbers; the weights hold some that are "
            "none, or values overflow: see trainer.precision"
        )


def _write_features(records: Records, ids: Sequence[str], scales: Sequence[np.ndarray]) -> None:
    """Write the features ``(B, D, h, w)`` of each scale, a record a picture."""
    for place, image_id in enumerate(ids):
        check_finite(image_id, *[features[place] for features in scales])
        buffer = io.BytesIO()
        np.savez(buffer, *[features[place] for features in scales])
        records.write(f"{image_id}.npz", buffer.getvalue())


def write_maps(
    records: Sequence[Records],
    ids: Sequence[str],
    maps: Sequence[Tensor],
    labels: Tensor,
    size: tuple[int, int],
) -> None:
    """Write seed records ``<id>.npz`` of pictures of one size.

    Args:
        records: Where they go, for each setting.
        ids: Names of the B pictures.
        maps: For each setting ``(L, h, w)``; L counts the True labels, picture by picture.
        labels: Which classes were mapped ``(B, C)`` bool.
        size: Height and width of the pictures.
    """
    ends = labels.sum(1).cumsum(0).tolist()
    for found, stacked in zip(records, maps, strict=True):
        values = stacked.half().cpu().numpy()
        for image_id, shown, end in zip(ids, labels.cpu(), ends, strict=True):
            keys = shown.nonzero()[:, 0].numpy()
            check_finite(image_id, values[end - len(keys) : end])
            record = SeedRecord(keys, values[end - len(keys) : end], size)
            found.write(f"{image_id}.npz", seed_bytes(record))
