"""The stages of instances: by displacements, and as the parts of masks that hang together."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpcam.data.dataset import Picture, SegmentationDataset, fingerprint, open_picture
from lpcam.evaluation.instances import Entry, region_entry, region_mask
from lpcam.models.host import Host
from lpcam.refiners.irn import IRN
from lpcam.refiners.irn.instances import cut_out
from lpcam.seeds.record import SeedRecord, read_seed
from lpcam.stages.refined import load_trained
from lpcam.storage.arrays import stored, stored_record
from lpcam.storage.parallel import for_each
from lpcam.storage.records import Records
from lpcam.storage.store import Stage


def instances(
    store: Path,
    dataset: SegmentationDataset,
    refined: Mapping[str, Stage],
    background: float,
    maps: Mapping[str, Stage],
    host: Host,
    refiner: IRN,
    trained: Stage,
) -> dict[str, Stage]:
    """Instances by displacements.

    Args:
        store: The store's folder.
        dataset: The data.
        refined: The refined maps by split.
        background: The score that an instance has to exceed.
        maps: The maps that were refined, by split.
        host: The trained host.
        refiner: The refiner.
        trained: What it learnt.

    Returns:
        A stage a split; :func:`read_instances` reads it.
    """
    load_trained(refiner, trained, host)
    mean = _mean_displacement(store, refiner, trained, dataset)

    def scores(records: Records, picture: Picture) -> SeedRecord:
        seed = read_seed(records, picture.id)
        return refiner.instances(open_picture(picture.path), seed, mean, background)

    stages = {}
    for split in dataset.map_splits:
        inputs = {"refined": refined[split].key, "mean": mean.tolist(), "background": background}
        stages[split] = stage = Stage(store, "instances", inputs)
        _find(stage, dataset.pictures(split), partial(scores, maps[split].records), background)
    return stages


def components(
    store: Path, dataset: SegmentationDataset, refined: Mapping[str, Stage], background: float
) -> dict[str, Stage]:
    """The connected parts of masks as instances, which displacements have to surpass.

    Args:
        store: The store's folder.
        dataset: The data.
        refined: The refined maps by split.
        background: The background score of the masks.

    Returns:
        As :func:`instances`.
    """

    def scores(records: Records, picture: Picture) -> SeedRecord:
        return read_seed(records, picture.id)

    stages = {}
    for split in dataset.map_splits:
        inputs = {"refined": refined[split].key, "background": background}
        stages[split] = stage = Stage(store, "components", inputs)
        _find(stage, dataset.pictures(split), partial(scores, refined[split].records), background)
    return stages


def read_instances(stage: Stage, picture: Picture) -> list[Entry]:
    """What was found in a picture, the highest score first.

    Returns:
        Entries as in COCO's results, but for ``label``, the class index, in the place of ids.
    """
    with stored_record(stage.records, f"{picture.id}.json") as file:
        found: list[Entry] = json.load(file)
    return found


def instance_masks(stage: Stage, picture: Picture) -> list[np.ndarray]:
    """Masks ``(H, W)`` bool of what was found in a picture, the highest score first."""
    return [region_mask(entry) for entry in read_instances(stage, picture)]


def _mean_displacement(
    store: Path, refiner: IRN, trained: Stage, dataset: SegmentationDataset
) -> Tensor:
    """Mean ``(2,)`` of the displacements of the training pictures, each counting the same."""
    pictures = dataset.pictures(dataset.train_split)
    inputs = {"trained": trained.key, "pictures": fingerprint(pictures)}
    stage = Stage(store, "mean_displacement", inputs)
    with stage.build() as folder:
        if folder:
            means = np.zeros((len(pictures), 2), np.float32)

            def look(place: int) -> None:
                image = open_picture(pictures[place].path)
                means[place] = refiner.displacement(image).mean((1, 2))

            for_each(look, range(len(pictures)), "Mean displacement")
            np.save(folder / "mean.npy", means.mean(0))
    with stored(stage.folder / "mean.npy") as path:
        return torch.from_numpy(np.load(path, allow_pickle=False))


def _find(
    stage: Stage,
    pictures: list[Picture],
    scores: Callable[[Picture], SeedRecord],
    background: float,
) -> None:
    """Make the stage: cut instances out of the scores of each picture."""
    with stage.build(resume=True) as folder:
        if not folder:
            return
        records = Records(folder)

        def find(picture: Picture) -> None:
            name = f"{picture.id}.json"
            if name not in records:
                found = [
                    {"label": item.label, "score": item.score, **region_entry(item.mask)}
                    for item in cut_out(scores(picture), background)
                ]
                records.write(name, json.dumps(found).encode())

        for_each(find, pictures, f"Finding {stage.name}")
