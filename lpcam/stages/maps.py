"""The stage of maps, of any number of settings from one pass over the pictures."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from pydantic import Field

from lpcam.data.dataset import Picture, fingerprint, multi_hot, open_image
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, Propagation
from lpcam.settings import CHECKED, Count, Share
from lpcam.stages.callbacks import LPCAMCallback, write_maps
from lpcam.stages.finer import finer_features, read_finer
from lpcam.stages.passes import ViewSettings, check_space, feature_bytes, predict
from lpcam.storage.arrays import read_arrays, stored_record
from lpcam.storage.hashing import tensors_digest
from lpcam.storage.parallel import for_each
from lpcam.storage.ranks import agree, is_main_process
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Inference(ViewSettings):
    """How maps are made.

    Attributes:
        eps: See :func:`~lpcam.functional.normalize_maps`.
        batch_size: Pictures of one size that share a forward pass.
        keep_features: GB that the features of a split's pictures may take in the store.
        propagate: The ``sharpness`` of :class:`~lpcam.prototypes.maps.Propagation`; 0 for no such
            step.
        stage_weight: See there.
        own_share: See there.
    """

    eps: Annotated[float, Field(ge=0)] = 1e-5
    batch_size: Count = 1
    keep_features: Annotated[float, Field(ge=0)] = 20.0
    propagate: Annotated[float, Field(ge=0, le=100)] = 0.0
    stage_weight: Annotated[float, Field(ge=0, le=100)] = 2.0
    own_share: Share = 0.4

    @property
    def views(self) -> ViewSettings:
        """The views alone."""
        return ViewSettings(self.scales, self.flip)

    @property
    def propagation(self) -> Propagation | None:
        """The step that follows on LPCAM's maps, if there is one."""
        if not self.propagate:
            return None
        return Propagation(self.propagate, self.stage_weight, self.own_share)


def maps(
    store: Path,
    make_trainer: MakeTrainer,
    host: Host,
    pictures: Sequence[Picture],
    settings: Mapping[str, MapSetting],
    inference: Inference,
    *,
    num_workers: int | None,
) -> dict[str, Stage]:
    """Maps of every setting from one pass over the pictures: seed records.

    The pass also keeps the features of all scales, if the pictures' are small enough. Then further
    settings of LPCAM are made from them, without the host.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        host: The trained host.
        pictures: The pictures.
        settings: What to compute, by name. Equal settings share a stage.
        inference: How.
        num_workers: Processes that decode pictures.

    Returns:
        The stage of each setting.
    """
    common = {
        "features": host.feature_key,
        "pictures": fingerprint(pictures),
        **asdict(inference.views),
    }
    stages = {
        name: Stage(store, "maps", {**common, **_inputs(setting, host, inference)})
        for name, setting in settings.items()
    }
    distinct = {stages[name].key: name for name in settings}
    views = Stage(store, "views", common, version=2)
    with ExitStack() as stack:
        missing: list[Records] = []
        wanted: list[MapSetting] = []
        for key in sorted(distinct):  # every process takes the locks in the same order
            folder = stack.enter_context(stages[distinct[key]].build(resume=True, together=True))
            if folder:
                missing.append(Records(folder))
                wanted.append(settings[distinct[key]])
        if not missing:
            return stages
        keeps = not host.finishes and (
            agree(views.done)
            or feature_bytes(host, pictures, inference.scales) <= inference.keep_features * 1e9
        )
        kept, ready = None, False
        if keeps:
            # Where another process is making them this waits, and finds them done.
            folder = stack.enter_context(views.build(resume=True, together=True))
            ready = folder is None
            if folder:
                kept = Records(folder)
                check_space(kept, host, pictures, inference.scales)
        maker = MapMaker(wanted, eps=inference.eps, factors=inference.scales, rounded=keeps)
        finer = None
        if any(setting.propagation for setting in wanted):
            finer = finer_features(store, make_trainer, host, pictures, num_workers=num_workers)
        if ready and all(setting.directions is not None for setting in wanted):
            if is_main_process():
                _maps_from_kept(views, finer, host.num_classes, pictures, maker, missing)
            return stages
        records = [*missing, *([kept] if kept else [])]
        predict(
            make_trainer,
            host,
            pictures,
            LPCAMCallback(maker, missing, kept=kept, finer=finer),
            done=lambda p: all(f"{p.id}.npz" in found for found in records),
            scales=inference.scales,
            flip=inference.flip,
            batch_size=inference.batch_size,
            num_workers=num_workers,
        )
    return stages


def _inputs(setting: MapSetting, host: Host, inference: Inference) -> dict[str, Any]:
    """What decides a setting's maps, beyond the pictures and their features."""
    if setting.directions is None:
        return {"head": "host", "score": host.score_key}
    inputs: dict[str, Any] = {
        "head": "lpcam",
        "matrix": tensors_digest({"directions": setting.directions}),
        "offset": setting.offset,
        "eps": inference.eps,
    }
    if host.finishes:
        inputs["score"] = host.score_key
    if setting.signed != "keep":
        inputs["signed"] = setting.signed
    if setting.mean is not None:
        inputs["mean"] = tensors_digest({"mean": setting.mean})
    if setting.propagation:
        inputs["propagation"] = {**asdict(setting.propagation), "version": 2}
    return inputs


def _maps_from_kept(
    views: Stage,
    finer: Stage | None,
    num_classes: int,
    pictures: Sequence[Picture],
    maker: MapMaker,
    records: Sequence[Records],
) -> None:
    """What a pass of :class:`LPCAMCallback` would write, without the host."""

    def write(picture: Picture) -> None:
        name = f"{picture.id}.npz"
        if all(name in found for found in records):
            return
        with open_image(picture.path, decode=False) as image:
            size = (image.height, image.width)
        with stored_record(views.records, name) as file:
            kept = read_arrays(file)
        features = [torch.from_numpy(scale)[None, None].float() for scale in kept.values()]
        labels = torch.from_numpy(multi_hot([picture], num_classes)).bool()
        stages = [read_finer(finer, picture.id)] if finer else None
        found = maker([HostViews(scale) for scale in features], labels, size, stages=stages)
        write_maps(records, [picture.id], found, labels, size)

    for_each(write, pictures, "Maps")
