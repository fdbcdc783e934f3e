"""Fitted maps for use elsewhere: as one graph, as pseudo masks, as COCO results, as boxes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from lpcam.data.dataset import IGNORED, open_image
from lpcam.errors import InputError
from lpcam.explain.explainer import LPCAM
from lpcam.explain.feature_layers import evaluating, recorded
from lpcam.functional import normalize_maps
from lpcam.prototypes.maps import Propagation, spread
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.palette import save_mask
from lpcam.storage.files import write_atomically


class MapModel(nn.Module):
    """A model that gives maps instead of scores: backbone and prototypes in one.

    ``torch.jit.trace(MapModel(cam).eval(), images)`` makes TorchScript of it, which torch has
    deprecated in favour of :func:`export_program`. Pictures may then have another size if the model
    itself takes any. ``torch.jit.script`` does not work: a hook reads the features.

    Args:
        cam: A fitted LPCAM; its model is shared, not copied.
        propagate: Sharpness of the step that carries maps to edges, as in a call of the LPCAM.

    Raises:
        InputError: The model has no finer layer to propagate by.
    """

    def __init__(self, cam: LPCAM, propagate: float = 0.0) -> None:
        super().__init__()
        self.model = cam.model
        self.cam = cam
        self.step = Propagation(propagate) if propagate else None
        self.finer = cam.finer if propagate else cam.layers.layer

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)`` of all classes, as ``cam(images)`` gives them for one view."""
        with recorded(self.finer) as stages:
            features = self.cam.layers.features(self.model, images)
        maps = self.cam.head.maps(features)
        size = (images.shape[2], images.shape[3])
        maps = normalize_maps(F.interpolate(maps, size, mode="bilinear", align_corners=False))
        if self.step is None:
            return maps
        # A class that is not fitted has no map, and none is carried to it.
        fitted = torch.tensor(self.cam.head.fitted, device=maps.device)
        carried = spread(maps[:, fitted], [features], stages[0], self.step, size)
        return maps.index_copy(1, fitted, carried)


def export_program(
    cam: LPCAM, images: Tensor, *, propagate: float = 0.0
) -> torch.export.ExportedProgram:
    """Capture model and prototypes as one graph with ``torch.export``.

    Args:
        cam: A fitted LPCAM.
        images: Pictures of the size that the graph is for ``(B, 3, H, W)``; B stays free.
        propagate: As in :class:`MapModel`.

    Returns:
        The program; ``program.module()(images)`` gives maps ``(B, C, H, W)``.
    """
    images = images.to(cam.layers.classifier.weight)
    # A batch of one would be taken for a constant.
    example = torch.cat([images, images])[:2]
    with evaluating(cam.model):
        module = MapModel(cam, propagate).eval()
        batch = torch.export.Dim("batch", min=1)
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)


def export_onnx(cam: LPCAM, path: str | Path, images: Tensor, *, propagate: float = 0.0) -> float:
    """Write model and prototypes as one ONNX graph, and run it to check.

    Args:
        cam: A fitted LPCAM.
        path: The file; its input is ``images``, its output ``maps`` ``(B, C, H, W)``.
        images: Pictures of the size that the graph is for ``(B, 3, H, W)``; B stays free.
        propagate: As in :class:`MapModel`.

    Returns:
        Largest difference between the maps of onnxruntime and torch on the pictures.

    Raises:
        InputError: A package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"export: needs the package {error.name}; pip install 'lpcam[export]'"
        ) from error
    program = export_program(cam, images, propagate=propagate)
    torch.onnx.export(
        program,
        f=str(path),
        input_names=["images"],
        output_names=["maps"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = images.to(cam.layers.classifier.weight)
    (found,) = session.run(None, {"images": images.cpu().numpy()})
    expected = cam(images, propagate=propagate).cpu().numpy()
    return float(np.abs(found - expected).max())


def save_masks(
    maps: Tensor, labels: Tensor, paths: Sequence[str | Path], background: float = 0.5
) -> None:
    """Write a pseudo mask a picture, a palette PNG: 0 background, class index + 1 elsewhere.

    Args:
        maps: Maps ``(B, C, H, W)`` in 0..1.
        labels: Multi-hot labels ``(B, C)``; only classes that are there can win a pixel.
        paths: The B files.
        background: The score that a class has to exceed.

    Raises:
        InputError: There are not as many labels and paths as maps, or more than 254 classes.
    """
    if not len(maps) == len(labels) == len(paths) or maps.shape[1] != labels.shape[1]:
        raise InputError(
            f"save_masks: maps of {tuple(maps.shape[:2])}, labels of {tuple(labels.shape)} and "
            f"{len(paths)} paths; give as many of each"
        )
    if maps.shape[1] > 254:
        raise InputError(
            f"save_masks: {maps.shape[1]} classes do not fit a palette of 254; pass those of "
            "interest, maps[:, chosen] and labels[:, chosen]"
        )
    for picture, shown, path in zip(maps.cpu(), labels.cpu(), paths, strict=True):
        keys = shown.nonzero()[:, 0]
        save_mask(Path(path), seed_mask(picture[keys], keys.numpy(), background))


def export_coco(folder: str | Path, path: str | Path, category_ids: Sequence[int]) -> int:
    """Write the pseudo masks of a folder as one file of COCO results, run-length encoded.

    Each class of a picture is one entry of score 1: a mask does not tell objects apart. The image
    id is the number at the end of the file's name, as COCO names its pictures, or the whole name
    where it ends in none. Pixels of 255 belong to no class.

    Args:
        folder: Holds ``<id>.png``, palette or greyscale.
        path: The JSON file.
        category_ids: The category id of each class, such as
            :data:`lpcam.data.coco.CATEGORY_IDS`; of the class that a mask calls 1 first.

    Returns:
        Number of entries.

    Raises:
        InputError: pycocotools is missing, there is no mask, two have the same image id, or a mask
            cannot be read or holds a label without a category id.
    """
    try:
        from pycocotools.mask import encode
    except ModuleNotFoundError as error:
        raise InputError(
            "export_coco: needs the package pycocotools; pip install 'lpcam[coco]'"
        ) from error
    files = sorted(Path(folder).glob("*.png"))
    if not files:
        raise InputError(f"{folder}: holds no mask <id>.png; name a run's folder masks")
    entries: list[dict[str, object]] = []
    seen: dict[int | str, Path] = {}
    for file in files:
        number = re.search(r"(?a:\d+)$", file.stem)
        image_id = int(number[0]) if number else file.stem
        if image_id in seen:
            raise InputError(
                f"{file}: image id {image_id}, which is also that of {seen[image_id].name}; "
                "rename one"
            )
        seen[image_id] = file
        with open_image(file) as image:
            if image.mode not in ("P", "L"):
                raise InputError(f"{file}: mask of mode {image.mode}; save palette or greyscale")
            mask = np.asarray(image)
        for label in np.unique(mask[(mask > 0) & (mask != IGNORED)]).tolist():
            if label > len(category_ids):
                raise InputError(
                    f"{file}: holds {label}, but there are {len(category_ids)} category ids; give "
                    "one for every class"
                )
            code = encode(np.asfortranarray(mask == label, np.uint8))
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label - 1],
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                    "score": 1.0,
                }
            )
    write_atomically(Path(path), json.dumps(entries))
    return len(entries)


def boxes(heat: Tensor, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Boxes around the connected parts of a map above a threshold.

    A map tells objects apart only where they do not touch: there is one box a part, not an object.

    Args:
        heat: One map ``(H, W)`` in 0..1.
        threshold: What a pixel has to exceed.

    Returns:
        Boxes ``(n, 4)`` int64 as x0, y0, x1, y1 in pixels, x1 and y1 exclusive, the box of the
        largest part first; and the mean activation of each part ``(n,)``.
    """
    values = heat.detach().float().cpu().numpy()
    parts, count = ndimage.label(values > threshold, np.ones((3, 3)))
    index = np.arange(1, count + 1)
    spans = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(parts)]
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-areas, kind="stable")
    scores = np.asarray(ndimage.mean(values, parts, index)) if count else np.zeros(0)
    return np.array(spans, np.int64).reshape(-1, 4)[order], scores[order]
