"""What a run puts into its own folder, and what its report says about prototypes."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from lpcam.prototypes.centers import Centers
from lpcam.models.classifier import Classifier
from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.storage.parallel import for_each
from lpcam.stages.features import read_features
from lpcam.prototypes.prototype_set import SIDES, Prototypes
from lpcam.prototypes.selection import class_score
from lpcam.reporting.report import PrototypeView
from lpcam.seeds.record import load_seed
from lpcam.seeds.masks import mark_unsure, save_mask, seed_mask
from lpcam.storage.store import Stage


def export(
    output: Path,
    seeds: Stage,
    refined: Stage | None,
    pictures: Sequence[Picture],
    background: float,
    unsure_band: float,
) -> None:
    """Put maps and pseudo masks into a run's folder.

    Args:
        output: The run's folder; gets ``maps/<id>.npz``, with a refiner ``refined/<id>.npz`` too,
            and ``masks/<id>.png``.
        seeds: The maps.
        refined: Scores that a refiner made of them. The masks come from these where there are any.
        pictures: Which.
        background: The background score of the masks.
        unsure_band: See :func:`~lpcam.seeds.masks.mark_unsure`.
    """
    linked = {"maps": seeds} | ({"refined": refined} if refined else {})
    for name in (*linked, "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)

    def write(picture: Picture) -> None:
        file = f"{picture.id}.npz"
        for name, stage in linked.items():
            target = output / name / file
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to(stage.folder / file)
            except OSError:  # another file system
                shutil.copyfile(stage.folder / file, target)
        seed = load_seed((refined or seeds).folder / file)
        maps = seed.full_size()
        mask = seed_mask(maps, seed.keys, background)
        mask = mark_unsure(mask, maps, background, unsure_band)
        save_mask(output / "masks" / f"{picture.id}.png", mask)

    for_each(write, pictures, "Writing masks")


def prototype_views(
    found: Stage,
    centers: Centers,
    prototypes: Prototypes,
    classifier: Classifier,
    dataset: SegmentationDataset,
) -> list[PrototypeView]:
    """What the report says about every prototype, kept or not."""
    pictures = dataset.pictures(dataset.prototype_split)

    @functools.cache
    def grid(index: int) -> tuple[int, int]:
        height, width, _ = read_features(found, pictures[index], "local").shape
        return height, width

    views = []
    for c, name in enumerate(dataset.classes):
        for s, side in enumerate(SIDES):
            scores = class_score(centers.centers[c, s], classifier.weight, c)
            for j in centers.counts[c, s].nonzero()[:, 0].tolist():
                places = [p for p in centers.nearest[c, s, j].tolist() if p[0] >= 0]
                patches = [
                    (pictures[i], ((row + 0.5) / grid(i)[0], (column + 0.5) / grid(i)[1]))
                    for i, row, column in places
                ]
                views.append(
                    PrototypeView(
                        class_name=name,
                        side=side,
                        index=j,
                        score=float(scores[j]),
                        count=int(centers.counts[c, s, j]),
                        kept=j in prototypes.indices[c][s],
                        patches=patches,
                    )
                )
    return views
