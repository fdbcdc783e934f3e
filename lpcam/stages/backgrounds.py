"""Background scores that are chosen without masks."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lpcam.data.dataset import Picture, fingerprint, open_picture
from lpcam.seeds.record import read_seed
from lpcam.seeds.threshold import STEPS, chosen_score, colours, foreground_shares, parting
from lpcam.storage.arrays import stored
from lpcam.storage.parallel import for_each
from lpcam.storage.store import Stage

PICTURES = 500  # more would not move the mean


def backgrounds(
    store: Path, maps: Mapping[str, Stage], pictures: Sequence[Picture]
) -> dict[str, float]:
    """Background scores for maps, see :mod:`lpcam.seeds.threshold`.

    Args:
        store: The store's folder.
        maps: Maps by name. Each picture is read once for all names.
        pictures: The pictures; of many, some that lie evenly apart in their order.

    Returns:
        The score of each name.
    """
    chosen = pictures[:: -(-len(pictures) // PICTURES)]
    looked_at = fingerprint(chosen)
    stages = {
        stage.key: Stage(store, "backgrounds", {"maps": stage.key, "pictures": looked_at})
        for stage in maps.values()
    }
    records = {stage.key: stage.records for stage in maps.values()}
    with ExitStack() as stack:
        todo = []
        for key in sorted(stages):
            folder = stack.enter_context(stages[key].build())
            if folder:
                # A row a picture, so that the sum does not depend on which one was ready first.
                todo.append((folder, records[key], np.zeros((len(chosen), STEPS + 1))))

        def look(place: int) -> None:
            image = open_picture(chosen[place].path)
            cells = functools.cache(functools.partial(colours, image))
            for _, source, rows in todo:
                seed = read_seed(source, chosen[place].id)
                found = parting(cells(seed.maps.shape[1:]), seed)
                if found is not None:
                    rows[place] = found

        if todo:
            for_each(look, range(len(chosen)), "Choosing thresholds")
        for folder, _, rows in todo:
            np.save(folder / "parted.npy", rows.sum(0))
    found = {}
    for name, stage in maps.items():
        with stored(stages[stage.key].folder / "parted.npy") as path:
            found[name] = chosen_score(np.load(path, allow_pickle=False))
    return found


def matched_background(
    seeds: Stage, refined: Stage, pictures: Sequence[Picture], background: float
) -> float:
    """The background score of refined maps, for which as much is an object as of the maps before.

    A refiner moves the edges of objects and may change the scale of scores, but objects stay as
    large as they were.

    Args:
        seeds: The maps before.
        refined: The maps after.
        pictures: The pictures.
        background: The background score of the maps before.
    """
    chosen = pictures[:: -(-len(pictures) // PICTURES)]
    before, after = np.zeros((2, len(chosen), STEPS + 1))

    def look(place: int) -> None:
        for stage, rows in ((seeds, before), (refined, after)):
            seed = read_seed(stage.records, chosen[place].id)
            rows[place] = foreground_shares(seed) * seed.size[0] * seed.size[1]

    for_each(look, range(len(chosen)), "Matching thresholds")
    wanted = before.sum(0)[round(background * STEPS)]
    return int(np.abs(after.sum(0) - wanted).argmin()) / STEPS
