"""The stage of local features at the pictures' own size."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field

from lpcam.data.dataset import Picture, fingerprint
from lpcam.errors import InputError
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.settings import CHECKED
from lpcam.stages.callbacks import FeatureCallback
from lpcam.stages.passes import ViewSettings, check_space, feature_bytes, predict
from lpcam.storage.arrays import read_arrays, stored_record
from lpcam.storage.ranks import agree
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class FeatureLimit:
    """How much of the store local features may take; no part of any key.

    Attributes:
        max_features: GB of the local features of all pictures to cluster.
    """

    max_features: Annotated[float, Field(ge=0)] = 50.0


def features(
    store: Path,
    make_trainer: MakeTrainer,
    host: Host,
    pictures: Sequence[Picture],
    *,
    local: bool,
    num_workers: int | None,
    sampled: ViewSettings | None = None,
    limit: FeatureLimit | None = None,
) -> Stage:
    """Features of each picture, not mirrored: records ``<id>.npz``.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        host: The host.
        pictures: The pictures.
        local: Whether local features are wanted, and not just their means.
        num_workers: Processes that decode pictures.
        sampled: The views of the maps that local features are going to be split by, kept with the
            features, see :func:`~lpcam.prototypes.maps.sampled_maps`. None for the host's own maps
            of the features themselves, kept only where they cannot be told from the features.
        limit: What local features that are still to be computed may take. None for no limit.

    Raises:
        InputError: Scale 1, that of the features, is not among the scales, or the features would
            take more than the limit.
    """
    inputs: dict[str, Any] = {
        "features": host.feature_key,
        "pictures": fingerprint(pictures),
        "local": local,
    }
    maps = None
    if sampled:
        if 1 not in sampled.scales:
            raise InputError(
                f"inference.scales={list(sampled.scales)}: prototypes.split=multi_scale takes "
                "features at scale 1; add it"
            )
        maps = "multi_scale"
        inputs |= {"score": host.score_key, "views": asdict(sampled)}
    elif local and not host.maps_from_features:
        maps = "single_view"
        inputs["score"] = host.score_key
    stage = Stage(store, "features", inputs)
    if local and limit and not agree(stage.done):
        size = feature_bytes(host, pictures, [1.0]) / 1e9
        if size > limit.max_features:
            raise InputError(
                f"prototypes.max_features={limit.max_features:g}: the local features of "
                f"{len(pictures)} pictures would take {size:.3g} GB of the store; set "
                "prototypes.images_per_class=100, as the paper does on COCO, or "
                f"prototypes.max_features={math.ceil(size)}"
            )
    with stage.build(resume=True, together=True) as folder:
        if folder:
            records = Records(folder)
            if local:
                check_space(records, host, pictures, [1.0])
            others = [scale for scale in sampled.scales if scale != 1] if sampled else []
            predict(
                make_trainer,
                host,
                pictures,
                FeatureCallback(records, local=local, maps=maps),
                done=lambda picture: f"{picture.id}.npz" in records,
                scales=[1.0, *others],
                flip=sampled is not None and sampled.flip,
                batch_size=1,
                num_workers=num_workers,
            )
    return stage


def read_features(stage: Stage, picture: Picture, name: str) -> np.ndarray:
    """One array of one picture from a features stage, see :class:`FeatureCallback`."""
    with stored_record(stage.records, f"{picture.id}.npz") as file:
        return read_arrays(file, name)[name]
