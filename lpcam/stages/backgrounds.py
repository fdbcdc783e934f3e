"""The stage of background scores that are chosen without masks."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lpcam.data.dataset import Picture, fingerprint, open_picture
from lpcam.seeds.record import load_seed
from lpcam.seeds.threshold import STEPS, chosen_score, parting
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
    folders = {stage.key: stage.folder for stage in maps.values()}
    with ExitStack() as stack:
        todo = []
        for key in sorted(stages):
            folder = stack.enter_context(stages[key].build())
            if folder:
                # A row a picture, so that the sum does not depend on which one was ready first.
                todo.append((folder, folders[key], np.zeros((len(chosen), STEPS + 1))))

        def look(place: int) -> None:
            image = open_picture(chosen[place].path)
            for _, source, rows in todo:
                found = parting(image, load_seed(source / f"{chosen[place].id}.npz"))
                if found is not None:
                    rows[place] = found

        if todo:
            for_each(look, range(len(chosen)), "Choosing thresholds")
        for folder, _, rows in todo:
            np.save(folder / "parted.npy", rows.sum(0))
    return {
        name: chosen_score(np.load(stages[stage.key].folder / "parted.npy", allow_pickle=False))
        for name, stage in maps.items()
    }
