"""Lightning callbacks that turn predictions into files as they come: local features, and maps.

Each picture's file is written whole under its own name, so that a killed run loses at most the
pictures of one batch and several processes can share the work.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lpcam.data.loaders import ViewBatch
from lpcam.functional import class_activation_map, local_prototype_map, merge_scales, normalize_maps
from lpcam.seeds import Seed, grid_size, save_seed
from lpcam.store import write_atomically


class FeatureCallback(BasePredictionWriter):
    """Write each picture's local features at its own size, for clustering and for the head.

    A file ``<id>.npz`` holds ``pooled`` (D,) float32, the mean feature, and ``local`` (h, w, D)
    float16 unless left out.

    Args:
        folder: Where the files go.
        local: Whether to write the local features too.
    """

    def __init__(self, folder: Path, *, local: bool) -> None:
        super().__init__("batch")
        self.folder = folder
        self.local = local

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[Tensor],
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        features = prediction[0][0]
        for image_id, own in zip(batch["ids"], features, strict=True):
            arrays = {"pooled": own.mean((1, 2)).float().cpu().numpy()}
            if self.local:
                arrays["local"] = own.permute(1, 2, 0).half().cpu().numpy()
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            write_atomically(self.folder / f"{image_id}.npz", buffer.getvalue())


@dataclass(frozen=True)
class MapHead:
    """One way of turning features into maps, and where they go.

    Attributes:
        folder: Where ``<id>.npz`` files go.
        directions: Directions ``(C, D)`` of LPCAM; None for plain CAM.
        offset: Added to LPCAM's signed map; 1 when there are only context prototypes, which makes
            the map ``1 - mean cosine to the context``.
    """

    folder: Path
    directions: Tensor | None
    offset: float = 0.0


class LPCAMCallback(BasePredictionWriter):
    """Write the maps of each picture's classes, for any number of heads from one forward pass.

    All directions are stacked into one matrix: M settings cost one product, not M passes. Features
    of a picture and its mirror image are added before LPCAM's cosine; plain CAM rectifies each and
    adds the maps. Scales are added on the stride-4 grid and the sum is divided by its maximum.

    Args:
        weight: Class weights ``(C, D)`` of the classifier.
        heads: What to compute.
    """

    def __init__(self, weight: Tensor, heads: Sequence[MapHead]) -> None:
        super().__init__("batch")
        self.weight = weight
        self.heads = heads

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[Tensor],
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        maps = self.maps(prediction, batch["labels"].bool(), batch["size"])
        for head, (picture_maps) in zip(self.heads, maps, strict=True):
            for image_id, labels, own in zip(
                batch["ids"], batch["labels"].bool(), picture_maps, strict=True
            ):
                keys = labels.nonzero()[:, 0].cpu().numpy()
                save_seed(head.folder / f"{image_id}.npz", Seed(keys, own, batch["size"]))

    def maps(
        self, features: list[Tensor], labels: Tensor, size: tuple[int, int]
    ) -> list[list[np.ndarray]]:
        """Maps of every head and picture.

        Args:
            features: For each scale ``(V, B, D, h, w)``, V mirrored views.
            labels: Which classes to map ``(B, C)`` bool.
            size: Height and width of the pictures.

        Returns:
            For each head, for each picture, ``(L, H', W')`` on the stride-4 grid.
        """
        present = labels.any(0).nonzero()[:, 0]
        pairs = labels[:, present].nonzero(as_tuple=True)
        counts = labels.sum(1).tolist()
        stacked = [h.directions[present] for h in self.heads if h.directions is not None]
        per_scale: list[list[Tensor]] = []
        for views in features:
            per_head: list[Tensor] = []
            signed = iter(())
            if stacked:
                directions = torch.cat(stacked).to(views)
                both = local_prototype_map(views.sum(0), directions)
                signed = iter(both.split(len(present), dim=1))
            for head in self.heads:
                if head.directions is None:
                    weight = self.weight[present].to(views)
                    cam = class_activation_map(views.flatten(0, 1), weight)
                    own = cam.unflatten(0, views.shape[:2]).sum(0)
                else:
                    own = (next(signed) + head.offset).relu()
                per_head.append(own[pairs])
            per_scale.append(per_head)
        return [
            [
                picture.half().cpu().numpy()
                for picture in normalize_maps(merge_scales(scales, grid_size(size))).split(counts)
            ]
            for scales in zip(*per_scale, strict=True)
        ]
