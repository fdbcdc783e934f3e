"""What a run puts into its own folder, and what its report says about prototypes."""

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

from lpcam.classifier import Classifier
from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.pipeline import read_features
from lpcam.prototypes import SIDES, Centers, Prototypes, class_score
from lpcam.reporting.report import PrototypeView
from lpcam.seeds import load_seed, save_mask, seed_mask
from lpcam.store import Stage, digest, write_atomically


def done_metrics(output: Path, config: Mapping[str, Any]) -> dict[str, float] | None:
    """The metrics of a run that was finished in this folder with this config; None if none was."""
    path = output / "DONE.json"
    try:
        done = json.loads(path.read_text())
        metrics: dict[str, float] = done["metrics"]
        return metrics if done["config"] == config_digest(config) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def config_digest(config: Mapping[str, Any]) -> str:
    """Hash a run's config without where its files go, and with the version that read it."""
    wanted = {name: value for name, value in config.items() if name not in ("paths", "logger")}
    return digest({**wanted, "version": version("lpcam")})


def write_done(
    output: Path,
    config: Mapping[str, Any],
    seconds: Mapping[str, float],
    metrics: Mapping[str, float],
) -> None:
    """Mark a run as finished; the last file that it writes.

    Args:
        output: The run's folder.
        config: Its resolved config.
        seconds: What it took: ``total``, and each stage that it computed itself.
        metrics: What ``metrics.json`` holds.
    """
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    done = {"config": config_digest(config), "seconds": rounded, "metrics": dict(metrics)}
    write_json(output / "DONE.json", done)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    write_atomically(path, json.dumps(value, indent=1))


def headline(metrics: Mapping[str, float], split: str) -> float | None:
    """The one number of a run: mIoU of the refined maps, or of LPCAM; None without masks."""
    found = (metrics.get(f"{split}/{stage}/miou") for stage in ("refined", "lpcam"))
    return next((value for value in found if value is not None), None)


def export(
    output: Path, seeds: Stage, scores: Stage, pictures: Sequence[Picture], background: float
) -> None:
    """Put maps and pseudo masks into a run's folder.

    Args:
        output: The run's folder; gets ``maps/<id>.npz`` and ``masks/<id>.png``.
        seeds: The maps.
        scores: What the masks are made from: the same maps, or refined ones.
        pictures: Which.
        background: The background score of the masks.
    """
    for name in ("maps", "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)
    for picture in track(pictures, "Writing masks"):
        source, target = (
            folder / f"{picture.id}.npz" for folder in (seeds.folder, output / "maps")
        )
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:  # another file system
            shutil.copyfile(source, target)
        seed = load_seed(scores.folder / f"{picture.id}.npz")
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
