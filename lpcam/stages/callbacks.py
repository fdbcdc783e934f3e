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
import torch.nn.functional as F
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lpcam.data.loaders import ViewBatch
from lpcam.functional import class_activation_map, local_prototype_map, merge_scales, normalize_maps
from lpcam.seeds.record import SeedRecord, grid_size, save_seed
from lpcam.storage.files import write_atomically


class FeatureCallback(BasePredictionWriter):
    """Write each picture's local features at its own size, for clustering and for the head.

    A file ``<id>.npz`` holds ``pooled`` (D,) float32, the mean feature, and ``local`` (h, w, D)
    float16 unless left out. With weights it also holds ``cam`` (L, h, w) float32, the
    :func:`sampled_cam` of the picture's classes in ascending order.

    The first scale of the pictures must be 1; it gives the features. All scales give the CAM.

    Args:
        folder: Where the files go.
        local: Whether to write the local features too.
        cam_weight: Class weights ``(C, D)``; None for no CAM.
    """

    def __init__(self, folder: Path, *, local: bool, cam_weight: Tensor | None = None) -> None:
        super().__init__("batch")
        self.folder = folder
        self.local = local
        self.cam_weight = cam_weight

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
        for place, (image_id, own) in enumerate(zip(batch["ids"], features, strict=True)):
            arrays = {"pooled": own.mean((1, 2)).float().cpu().numpy()}
            if self.local:
                arrays["local"] = own.permute(1, 2, 0).half().cpu().numpy()
            if self.cam_weight is not None:
                shown = self.cam_weight.to(own)[batch["labels"][place].bool()]
                scales = [views[:, place] for views in prediction]
                arrays["cam"] = sampled_cam(scales, shown, batch["size"]).cpu().numpy()
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            write_atomically(self.folder / f"{image_id}.npz", buffer.getvalue())


def sampled_cam(features: Sequence[Tensor], weight: Tensor, size: tuple[int, int]) -> Tensor:
    """CAM over scales and mirror images, as the published code splits features by it.

    It is made at the picture's full size: each view is rectified, views are added, scales are
    resized to sides that are multiples of 16, cut and added, and each map is divided by its
    maximum. Then one value a feature is read, that of the top left corner of the feature's cell
    (torch's ``nearest``), so no blurring and no other maximum enters.

    Args:
        features: For each scale ``(V, D, h, w)``, V mirrored views of one picture. The first
            scale's grid is sampled.
        weight: Weights ``(L, D)`` of the classes to map.
        size: Height and width of the picture.

    Returns:
        Maps ``(L, h, w)`` in 0..1.
    """
    height, width = size
    grid = features[0].shape[-2:]
    if not len(weight):
        return weight.new_zeros(0, *grid)
    rectified = [class_activation_map(views, weight).sum(0) for views in features]
    whole = merge_scales(rectified, (-(-height // 16) * 16, -(-width // 16) * 16))
    return F.interpolate(normalize_maps(whole[:, :height, :width])[None], grid)[0]


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
        eps: Added to the maximum that an LPCAM map is divided by; plain CAM's has its own.
        kept: Where the features of each picture go that LPCAM reads, a file ``<id>.npz`` with
            an array ``(D, h, w)`` float16 a scale in the order of the scales; None for nowhere.
            Maps are then made from the rounded features, so that they are the same whether made
            now or later from the file.
    """

    def __init__(
        self,
        weight: Tensor,
        heads: Sequence[MapHead],
        *,
        eps: float = 1e-5,
        kept: Path | None = None,
    ) -> None:
        super().__init__("batch")
        self.eps = eps
        self.weight = weight
        self.kept = kept
        self.plain = [head for head in heads if head.directions is None]
        self.fitted = [head for head in heads if head.directions is not None]
        directions = [head.directions for head in heads if head.directions is not None]
        self.directions = torch.stack(directions) if directions else weight[None, :0]
        self.offsets = torch.tensor([head.offset for head in self.fitted])

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
        if self.kept is not None:
            halves = [views.sum(0).half().cpu().numpy() for views in prediction]
            for place, image_id in enumerate(batch["ids"]):
                buffer = io.BytesIO()
                np.savez(buffer, *[own[place] for own in halves])
                write_atomically(self.kept / f"{image_id}.npz", buffer.getvalue())
        self.write(batch["ids"], prediction, batch["labels"].bool(), batch["size"])

    def write(
        self, ids: Sequence[str], features: list[Tensor], labels: Tensor, size: tuple[int, int]
    ) -> None:
        """Write the maps of pictures; arguments as for :meth:`maps`."""
        maps = self.maps(features, labels, size).half().cpu().numpy()
        ends = labels.sum(1).cumsum(0).tolist()
        for image_id, own, end in zip(ids, labels.cpu(), ends, strict=True):
            keys = own.nonzero()[:, 0].numpy()
            for head, its_maps in zip(self.plain + self.fitted, maps, strict=True):
                seed = SeedRecord(keys, its_maps[end - len(keys) : end], size)
                save_seed(head.folder / f"{image_id}.npz", seed)

    def maps(self, features: list[Tensor], labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps of every head, plain CAM first.

        Args:
            features: For each scale ``(V, B, D, h, w)``, V mirrored views. LPCAM reads only their
                sum.
            labels: Which classes to map ``(B, C)`` bool.
            size: Height and width of the pictures.

        Returns:
            ``(M, L, H', W')`` in 0..1 on the stride-4 grid, double precision; L counts the True
            labels of the whole batch, picture by picture.
        """
        present = labels.any(0).nonzero()[:, 0]
        if not len(present):
            return self.weight.new_zeros(len(self.plain + self.fitted), 0, *grid_size(size))
        wanted = labels[:, present]
        scales = [self._rectified(views, present)[:, wanted] for views in features]
        merged = merge_scales([maps.flatten(0, 1) for maps in scales], grid_size(size))
        merged = merged.unflatten(0, scales[0].shape[:2])
        plain, fitted = merged.tensor_split([len(self.plain)])
        return torch.cat([normalize_maps(plain), normalize_maps(fitted, self.eps)])

    def _rectified(self, views: Tensor, present: Tensor) -> Tensor:
        """Maps of one scale after ReLU, for M heads and P classes: ``(M, B, P, h, w)``."""
        # In single precision the last bits of a product, and of resizing, depend on how many maps
        # are stacked, and with them which way a value is rounded on disk: a setting would not give
        # the same file alone and in a sweep. MPS knows no double precision.
        precise = torch.float32 if views.device.type == "mps" else torch.float64
        maps = []
        if self.plain:
            cam = class_activation_map(views.flatten(0, 1), self.weight.to(views)[present])
            maps.append(cam.unflatten(0, views.shape[:2]).sum(0, keepdim=True).to(precise))
        if self.fitted:
            summed = views.sum(0)
            if self.kept is not None:
                summed = summed.half()
            directions = self.directions.to(views.device, precise)[:, present]
            signed = local_prototype_map(summed.to(precise), directions.flatten(0, 1))
            signed = signed.unflatten(1, directions.shape[:2]).transpose(0, 1)
            offsets = self.offsets.to(signed)[:, None, None, None, None]
            maps.append((signed + offsets).relu())
        return torch.cat(maps)
