"""What a run puts into its own folder and into its log."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lpcam.data.dataset import Picture
from lpcam.programs.build import build
from lpcam.programs.entry import choices, command_line
from lpcam.programs.run import Results, Run
from lpcam.prototypes.prototype_set import SIDES
from lpcam.prototypes.selection import class_score
from lpcam.reporting.patches import PrototypeView
from lpcam.reporting.report import write_report
from lpcam.reporting.shown import choose_pictures, saved_pictures, show
from lpcam.reporting.tracking import recording, start
from lpcam.reporting.wandb_content import log_results
from lpcam.seeds.masks import mark_unsure, seed_mask
from lpcam.seeds.palette import save_mask
from lpcam.seeds.record import read_seed
from lpcam.stages.features import read_features
from lpcam.stages.instance_scores import coco_results
from lpcam.stages.instances import instance_masks
from lpcam.storage.files import write_atomically, write_json
from lpcam.storage.hashing import tensors_digest
from lpcam.storage.parallel import for_each
from lpcam.storage.store import Stage

PROTOTYPES, METRICS = "prototypes.safetensors", "metrics.json"


def save(output: Path, cfg: DictConfig, run: Run, results: Results) -> None:
    """Write config, metrics, prototypes, maps, masks and instances.

    Args:
        output: The run's folder.
        cfg: The run's config.
        run: The job.
        results: What its stages gave.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(output / METRICS, results.metrics)
    fingerprint = tensors_digest(run.host.state_dict())
    replace(run.prototypes, model=fingerprint).save(output / PROTOTYPES)
    refined = results.maps.get("refined", {})
    background = results.backgrounds["refined" if refined else cfg.refiner.source]
    for split in run.dataset.map_splits:
        _save_maps(
            output,
            results.maps[cfg.refiner.source][split],
            refined.get(split),
            saved_pictures(run.dataset, split, cfg.shown_pictures, few=cfg.save == "shown"),
            background,
            cfg.thresholds.unsure_band,
        )
    for split, stage in results.instances.items():
        found = coco_results(run.dataset, split, stage)
        write_atomically(output / f"instances_{split}.json", json.dumps(found))


def _save_maps(
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
    copied = {"maps": seeds} | ({"refined": refined} if refined else {})
    for name in (*copied, "masks"):
        (output / name).mkdir(parents=True, exist_ok=True)

    def write(picture: Picture) -> None:
        file = f"{picture.id}.npz"
        for name, stage in copied.items():
            write_atomically(output / name / file, stage.records.read(file))
        seed = read_seed((refined or seeds).records, picture.id)
        maps = seed.full_size()
        mask = seed_mask(maps, seed.keys, background)
        mask = mark_unsure(mask, maps, background, unsure_band)
        save_mask(output / "masks" / f"{picture.id}.png", mask)

    for_each(write, pictures, "Writing masks")


def report(output: Path, cfg: DictConfig, run: Run, results: Results) -> None:
    """Write ``report.html`` and ``figures/*.png``; arguments as for :func:`save`."""
    dataset, split = run.dataset, run.dataset.map_splits[-1]
    units = results.instances.get(split)
    write_report(
        output / "report.html",
        title=f"LPCAM on {cfg.dataset._target_.split('.')[-1]}",
        command=command_line("infer", run.overrides),
        config=OmegaConf.to_yaml(cfg, resolve=True),
        dataset=dataset,
        splits={split: dataset.pictures(split) for split in dataset.map_splits},
        methods=list(results.methods.values()),
        threshold=results.backgrounds["lpcam"],
        prototypes=_prototype_views(run),
        seconds={name: stage.manifest["seconds"] for name, stage in results.stages.items()},
        gallery_split=split,
        instances=functools.partial(instance_masks, units) if units else None,
    )


def _prototype_views(run: Run) -> list[PrototypeView]:
    """What the report says about every prototype, kept or not."""
    dataset, centers = run.dataset, run.centers
    pictures = dataset.pictures(dataset.prototype_split)

    @functools.cache
    def grid(index: int) -> tuple[int, int]:
        height, width, _ = read_features(run.features, pictures[index], "local").shape
        return height, width

    views = []
    for c, name in enumerate(dataset.classes):
        for s, side in enumerate(SIDES):
            scores = class_score(run.host, centers.centers[c, s], c)
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
                        kept=j in run.prototypes.indices[c][s],
                        patches=patches,
                    )
                )
    return views


def log(output: Path, cfg: DictConfig, run: Run, results: Results) -> None:
    """Send the run to the configured logger; arguments as for :func:`save`."""
    dataset, split = run.dataset, run.dataset.map_splits[-1]
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    keys = {"store": {name: stage.key for name, stage in results.stages.items()}}
    used = {}
    if run.trained.stage:
        used[f"classifier-{run.trained.stage.key}"] = run.trained.checkpoint
    with recording():
        chosen = choose_pictures(dataset.pictures(split), cfg.shown_pictures)
        log_results(
            start(build(cfg.logger), config | keys, choices()),
            metrics=results.metrics,
            scores=results.scores,
            classes=dataset.classes,
            figures=sorted((output / "figures").glob("*.png")),
            shown=show(dataset, chosen, results.methods, split, results.backgrounds["lpcam"]),
            made={"prototypes": output / PROTOTYPES, "metrics": output / METRICS},
            used=used,
        )
