"""What a W&B run holds: scores, curves, tables of classes, pictures with masks, artifacts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger, WandbLogger

from lpcam.evaluation.segmentation import IGNORED, SegmentationResult
from lpcam.reporting.shown import Shown
from lpcam.reporting.tracking import summarise, warn

CURVE = ("miou", "precision", "recall")


def log_results(
    logger: Logger,
    *,
    metrics: Mapping[str, float],
    scores: Mapping[str, Mapping[str, SegmentationResult]],
    classes: Sequence[str],
    figures: Sequence[Path] = (),
    shown: Sequence[Shown] = (),
    made: Mapping[str, Path] | None = None,
    used: Mapping[str, Path] | None = None,
) -> None:
    """Log a finished run.

    Args:
        logger: From :func:`start`.
        metrics: What ``metrics.json`` holds. The rest is for W&B alone.
        scores: Scores by stage (``cam``, ``lpcam``, ...) and split.
        classes: Names of the C classes.
        figures: The report's figures.
        shown: Pictures with their masks.
        made: Files to keep as artifacts, by the artifact's name.
        used: Likewise, files that the run was made from.
    """
    if not isinstance(logger, WandbLogger):
        logger.log_metrics(dict(metrics))
        logger.save()
        return
    import wandb

    summarise(logger, {key: "max" for key in metrics if key.endswith("/miou")})
    logger.log_metrics(dict(metrics))
    content: dict[str, Any] = {**_curves(scores), **_class_tables(scores, classes)}
    for picture in shown:
        content |= _images(picture, classes)
    content |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
    logger.experiment.log(content)
    log_files(logger, made or {}, used or {})


def log_files(
    logger: Logger, made: Mapping[str, Path], used: Mapping[str, Path] | None = None
) -> None:
    """Keep files as W&B artifacts, as results of the run or as what it was made from.

    Equal content under an equal name is one version to W&B, whichever run comes first, so a file
    that one run made and another used links the two. A file that cannot be kept costs one line.

    Args:
        logger: From :func:`start`; other loggers than W&B's keep no files.
        made: Files by the artifact's name, whose part before a hyphen is its type.
        used: Likewise.
    """
    if not isinstance(logger, WandbLogger) or logger.experiment.disabled:
        return
    for name, path in [*made.items(), *(used or {}).items()]:
        try:
            _log_file(logger, name, path, used=name not in made)
        except Exception as error:
            warn(error, f"artifact {name} ")


def _log_file(logger: WandbLogger, name: str, path: Path, used: bool) -> None:
    import wandb

    artifact = wandb.Artifact(name, name.split("-")[0])
    # Immutable: sent from where it lies, not copied first.
    artifact.add_file(str(path), policy="immutable")
    artifact.finalize()
    run = logger.experiment
    # Not log_artifact and use_artifact: online, they wait for the server, the latter without end,
    # and leave nothing on disk to be sent later; use_artifact refuses offline runs.
    run._interface.publish_artifact(
        run, artifact, aliases=["latest"], is_user_created=used, use_after_commit=used
    )


def _curves(scores: Mapping[str, Mapping[str, SegmentationResult]]) -> dict[str, Any]:
    """For each split a line plot of mIoU, whose table holds the scores at every threshold."""
    import wandb

    rows: dict[str, list[list[Any]]] = {}
    for stage, by_split in scores.items():
        for split, result in by_split.items():
            if len(result.thresholds) == 1:  # labels, which no threshold made
                continue
            columns = [result.thresholds, *(getattr(result, name) for name in CURVE)]
            table = np.stack(columns, 1).tolist()
            rows.setdefault(split, []).extend([stage, *map(_known, row)] for row in table)
    return {
        f"{split}/curve": wandb.plot.line(
            wandb.Table(columns=["stage", "threshold", *CURVE], data=found),
            "threshold",
            "miou",
            stroke="stage",
            title=f"mIoU over the background threshold, {split}",
        )
        for split, found in rows.items()
    }


def _class_tables(
    scores: Mapping[str, Mapping[str, SegmentationResult]], classes: Sequence[str]
) -> dict[str, Any]:
    """For each split the IoU of each class at each stage's best threshold, a row a class."""
    import wandb

    tables = {}
    for split in dict.fromkeys(split for by_split in scores.values() for split in by_split):
        results = {stage: found[split] for stage, found in scores.items() if split in found}
        ious = [result.iou[result.best].tolist() for result in results.values()]
        rows = [
            [name, *map(_known, row)]
            for name, *row in zip(("background", *classes), *ious, strict=True)
        ]
        tables[f"{split}/classes"] = wandb.Table(columns=["class", *results], data=rows)
    return tables


def _known(value: float) -> float | None:
    return None if value != value else value


def _images(picture: Shown, classes: Sequence[str]) -> dict[str, Any]:
    """A picture with masks that W&B can switch on and off, and drawn, for masks may get lost.

    W&B has lost the masks of offline runs when they were sent (its issue 10035).
    """
    import wandb

    # A mask with an id that has no name is not shown.
    labels = {0: "background", **dict(enumerate(classes, 1)), IGNORED: "unknown"}
    masks = {
        name: {"mask_data": mask, "class_labels": labels} for name, mask in picture.masks.items()
    }
    return {
        f"pictures/{picture.id}": wandb.Image(picture.image, masks=masks, file_type="jpg"),
        f"overlays/{picture.id}": [
            wandb.Image(image, caption=name, file_type="jpg") for name, image in picture.overlays()
        ],
    }
