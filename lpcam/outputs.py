"""What a run puts into its own folder, and what its report says about prototypes."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from lpcam.classifier import Classifier
from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.pipeline import read_features
from lpcam.prototypes import SIDES, Centers, Prototypes, class_score
from lpcam.reporting.report import PrototypeView
from lpcam.seeds import load_seed, save_mask, seed_mask
from lpcam.store import Stage


def export(output: Path, found: Stage, pictures: Sequence[Picture], background: float) -> None:
    """Put maps and the pseudo masks made from them into a run's folder.

    Args:
        output: The run's folder; gets ``maps/<id>.npz`` and ``masks/<id>.png``.
        found: The maps.
        pictures: Which.
        background: The background score of the masks.
    """
    for name in ("maps", "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)
    for picture in track(pictures, "Writing masks"):
        source, target = (
            folder / f"{picture.id}.npz" for folder in (found.folder, output / "maps")
        )
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:  # another file system
            shutil.copyfile(source, target)
        seed = load_seed(source)
        mask = seed_mask(seed.full_size(), seed.keys, background)
        save_mask(output / "masks" / f"{picture.id}.png", mask)


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
