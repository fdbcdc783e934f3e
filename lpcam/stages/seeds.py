"""The stage of seeds: labels of pixels from a host's maps, which another host learns from."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pydantic

from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint, open_picture
from lpcam.models.host import Host
from lpcam.models.training import MakeTrainer
from lpcam.prototypes.centers import Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.maps import MapSetting, lpcam_setting
from lpcam.prototypes.selection import Selection, select
from lpcam.refiners.crf import check_backend
from lpcam.refiners.irn.refiner import THRESHOLDS, thresholds_around
from lpcam.refiners.labels import Method, relation_labels
from lpcam.seeds.palette import save_mask
from lpcam.seeds.record import read_seed
from lpcam.settings import CHECKED
from lpcam.stages.backgrounds import backgrounds
from lpcam.stages.centers import centers, prototype_pictures
from lpcam.stages.features import features
from lpcam.stages.maps import Inference, maps
from lpcam.storage.parallel import for_each
from lpcam.storage.ranks import agree, dealt, is_main_process, joined
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Seeding:
    """Which maps seeds are made of, and how.

    Attributes:
        source: The base's own maps (``cam``), or LPCAM with its prototypes.
        labels: What refines the labels, ``par`` or ``crf``, see
            :func:`~lpcam.refiners.labels.relation_labels`.
        scores: Background scores of the sure foreground and the sure background: those that are
            ``published`` for these maps, or ``auto``, around the one that parts the pictures best.
        clustering: The prototypes of ``lpcam``.
        draw: Likewise.
        selection: Likewise.
        inference: How the maps are made.
    """

    source: Literal["cam", "lpcam"]
    labels: Method
    scores: Literal["published", "auto"]
    clustering: Clustering
    draw: Draw
    selection: Selection
    inference: Inference

    @property
    def inputs(self) -> dict[str, object]:
        """What decides the seeds; of own maps no prototypes do."""
        found = asdict(self)
        for name in ("batch_size", "keep_features"):
            del found["inference"][name]
        if self.source == "cam":
            for name in ("clustering", "draw", "selection"):
                del found[name]
        return found


def seeds(
    store: Path,
    make_trainer: MakeTrainer,
    base: Host,
    dataset: SegmentationDataset,
    splits: Sequence[str],
    settings: Seeding,
    *,
    num_workers: int | None,
) -> dict[str, Stage]:
    """Seeds of every picture of some splits: ``<id>.png`` with 0 background, class + 1, 255 open.

    Args:
        store: The store's folder.
        make_trainer: Makes Lightning's trainer.
        base: The trained host that makes the maps.
        dataset: The data.
        splits: The splits that need seeds; the training split has them anyway.
        settings: How.
        num_workers: Processes that decode pictures.

    Returns:
        The stage of each split.

    Raises:
        InputError: Labels are not known, or the CRF is not installed.
    """
    if settings.labels == "crf":
        check_backend("pydensecrf", "classifier.seeds.labels=crf", "classifier.seeds.labels=par")
    setting = (
        MapSetting()
        if settings.source == "cam"
        else _lpcam(store, make_trainer, base, dataset, settings, num_workers)
    )
    train = dataset.train_split
    splits = tuple(dict.fromkeys((train, *splits)))
    found = {
        split: maps(
            store, make_trainer, base, dataset.pictures(split), {"": setting}, settings.inference,
            num_workers=num_workers,
        )[""]
        for split in splits
    }  # fmt: skip
    if settings.scores == "published":
        scores = THRESHOLDS["irn" if settings.source == "cam" else "lpcam"]
    else:
        chosen = {}
        if is_main_process() or not joined():
            chosen = backgrounds(store, {"": found[train]}, dataset.pictures(train))
        scores = thresholds_around(agree(chosen)[""])
    stages = {}
    for split in splits:
        pictures = dataset.pictures(split)
        inputs = {
            "maps": found[split].key,
            "pictures": fingerprint(pictures),
            "labels": settings.labels,
            "conf_fg": scores.conf_fg,
            "conf_bg": scores.conf_bg,
        }
        stages[split] = stage = Stage(store, "seeds", inputs)
        with stage.build(resume=True, together=True) as folder:
            if folder and (is_main_process() or joined()):
                label = functools.partial(
                    _label, found[split].records, folder, settings.labels, scores.conf_fg,
                    scores.conf_bg,
                )  # fmt: skip
                mine = [pictures[place] for place in dealt(len(pictures))]
                for_each(label, mine, f"Seeds of {split}")
    return stages


def _lpcam(
    store: Path,
    make_trainer: MakeTrainer,
    base: Host,
    dataset: SegmentationDataset,
    settings: Seeding,
    num_workers: int | None,
) -> MapSetting:
    """LPCAM with the prototypes of the base."""
    pictures, chosen = prototype_pictures(dataset, settings.draw)
    multi_scale = settings.clustering.split == "multi_scale"
    local = features(
        store,
        make_trainer,
        base,
        pictures,
        local=True,
        num_workers=num_workers,
        sampled=settings.inference.views if multi_scale else None,
    )
    _, found = centers(store, local, base, dataset, settings.clustering, chosen)
    prototypes = select(found, base, dataset.classes, settings.selection)
    return lpcam_setting(prototypes, "both", settings.inference.propagation)


def _label(
    source: Records, target: Path, method: Method, conf_fg: float, conf_bg: float, picture: Picture
) -> None:
    path = target / f"{picture.id}.png"
    if not path.is_file():
        seed = read_seed(source, picture.id)
        image = open_picture(picture.path)
        save_mask(path, relation_labels(image, seed, method, conf_fg=conf_fg, conf_bg=conf_bg))
