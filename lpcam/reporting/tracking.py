"""Logging a run, to Weights & Biases above all.

Results never depend on it: whatever a logger fails at costs one line on the terminal. A W&B run has
the scores under the names of ``metrics.json``, and for each split ``<split>/curve``, the scores at
every threshold, and ``<split>/classes``, the IoU of each class; ``pictures/<id>`` and
``overlays/<id>`` show the same pictures in every run.
"""

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger, WandbLogger

from lpcam.errors import InputError
from lpcam.evaluation.segmentation import IGNORED, SegmentationResult
from lpcam.reporting.shown import Shown
from lpcam.storage.ranks import is_main_process
from lpcam.storage.files import write_atomically

OWN_DATA_DIR = "WANDB_DATA_DIR" not in os.environ
CURVE = ("miou", "precision", "recall")
STEP = "trainer/global_step"  # the step of all that Lightning logs


def wandb_logger(
    folder: str,
    project: str,
    *,
    group: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] = (),
) -> WandbLogger:
    """A W&B logger that needs no account.

    When nobody is logged in the run is recorded offline, and one line says how to send it later.
    The run's id is kept in ``wandb_id.txt``: a killed run that starts again in its folder goes on
    under the same id.

    Args:
        folder: The run's folder; W&B makes a folder ``wandb`` in it.
        project: W&B project.
        group: Runs that belong together, such as those of a study.
        job_type: What the run does: ``train`` or ``infer``.
        tags: Tags of the run.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode not in ("online", "disabled"):
        mode = "offline" if mode or not wandb.login(prompt=False) else "online"
    Path(folder).mkdir(parents=True, exist_ok=True)
    if mode == "offline":
        print(f"W&B: recording offline; send it with  wandb sync {folder}/wandb/offline-run-*")
    if OWN_DATA_DIR:
        # Tables wait there until they are sent: with their run, not in a home that may be full.
        os.environ["WANDB_DATA_DIR"] = f"{folder}/wandb"
    return WandbLogger(
        project=project,
        save_dir=folder,
        id=_run_id(Path(folder)),
        group=group,
        job_type=job_type,
        tags=list(tags),
        mode=mode,  # Lightning's offline=True would leave WANDB_MODE set for the jobs that follow
        settings=wandb.Settings(
            silent=True,
            console="off",  # progress bars; Hydra keeps a log
            x_save_requirements=False,  # listing the installed packages takes 0.4 s a run
        ),
    )


def _run_id(folder: Path) -> str | None:
    """The id of the run in a folder, kept unless the run was finished; None but for rank 0."""
    if not is_main_process():
        return None
    path = folder / "wandb_id.txt"
    if path.is_file() and not (folder / "DONE.json").is_file():
        found = path.read_text().strip()
        if re.fullmatch("[0-9a-z]+", found):
            return found
    # From the system's randomness, for jobs of a sweep start with equal seeds in the same second.
    new = secrets.token_hex(6)
    write_atomically(path, new)
    return new


def start(
    logger: Logger,
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    summaries: Mapping[str, str] | None = None,
) -> Logger:
    """Start a run: log its settings and name it.

    Args:
        logger: The logger.
        config: The resolved config. Nested names are joined by ``/``, so that each value is a
            column.
        choices: The option chosen in each config group, logged as ``<group>``.
        summaries: How metrics that training logs are summarised, ``max`` or ``min``, by name.
    """
    flat = {**_flat(config), **choices}
    if "refiner" in choices:
        flat["refined"] = f"{choices['refiner']}({flat.get('refiner/source')})"
    logger.log_hyperparams(flat)
    if isinstance(logger, WandbLogger):
        logger.experiment.name = run_name(flat)
        _summarise(logger, summaries or {})
    return logger


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def run_name(flat: Mapping[str, Any]) -> str:
    """A run's name, from what studies change: ``k12 tau0.1 muf0.9 mub0.9 par(cam) seed0``.

    Args:
        flat: The config as :func:`start` logs it.
    """
    if "prototypes/k" not in flat:
        return f"{flat.get('backbone')} {flat.get('classifier')} seed{flat.get('seed')}"
    parts = [
        f"k{flat['prototypes/k']}",
        f"tau{flat.get('thresholds/activation')}",
        f"muf{flat.get('thresholds/class_score')}",
        f"mub{flat.get('thresholds/context_score')}",
    ]
    if flat.get("prototypes/use", "both") != "both":
        parts.append(flat["prototypes/use"])
    if flat.get("refiner", "none") != "none":
        parts.append(flat["refined"])
    return " ".join([*parts, f"seed{flat.get('seed')}"])


def _summarise(logger: WandbLogger, summaries: Mapping[str, str]) -> None:
    for key, summary in summaries.items():
        logger.experiment.define_metric(key, STEP, step_sync=True, summary=summary)


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

    _summarise(logger, {key: "max" for key in metrics if key.endswith("/miou")})
    logger.log_metrics(dict(metrics))
    log_files(logger, made or {}, used or {})
    content: dict[str, Any] = {**_curves(scores), **_class_tables(scores, classes)}
    for picture in shown:
        content |= _images(picture, classes)
    content |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
    logger.experiment.log(content)


def log_files(
    logger: Logger, made: Mapping[str, Path], used: Mapping[str, Path] | None = None
) -> None:
    """Keep files as W&B artifacts, as results of the run or as what it was made from.

    Equal content under an equal name is one version to W&B, whichever run comes first, so a file
    that one run made and another used links the two.

    Args:
        logger: From :func:`start`; other loggers than W&B's keep no files.
        made: Files by the artifact's name, whose part before a hyphen is its type.
        used: Likewise.
    """
    if not isinstance(logger, WandbLogger) or logger.experiment.disabled:
        return
    import wandb

    for name, path in [*made.items(), *(used or {}).items()]:
        artifact = wandb.Artifact(name, name.split("-")[0])
        # Immutable: sent from where it lies, not copied first.
        artifact.add_file(str(path), policy="immutable")
        if name in made:
            logger.experiment.log_artifact(artifact)
        elif logger.experiment.offline:
            # use_artifact refuses offline runs; this writes the record that it would.
            logger.experiment._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            logger.experiment.use_artifact(artifact)


def _curves(scores: Mapping[str, Mapping[str, SegmentationResult]]) -> dict[str, Any]:
    """For each split a line plot of mIoU, whose table holds the scores at every threshold."""
    import wandb

    rows: dict[str, list[list[Any]]] = {}
    for stage, by_split in scores.items():
        for split, result in by_split.items():
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


def finish() -> None:
    """End W&B's run, as failed while an error is on its way.

    Without it the next job of a sweep would go on writing to this run.
    """
    if "wandb" in sys.modules:
        import wandb

        with tolerated():
            wandb.finish(exit_code=int(sys.exception() is not None))


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Log a finished job inside this: failures are tolerated, and the run is ended."""
    try:
        with tolerated():
            yield
    finally:
        finish()


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
    """Make one line of a logger's failure, and end the run as failed.

    What could not be logged is in the run's folder all the same.
    """
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        line = text.strip().splitlines()[0]
        print(f"warning: not logged, results are not affected: {line}", file=sys.stderr)
        if "wandb" in sys.modules:
            import wandb

            with contextlib.suppress(Exception):
                wandb.finish(exit_code=1)
            if wandb.run is not None:  # its service does not answer: the next job needs another
                with contextlib.suppress(Exception):
                    wandb.teardown()
                wandb.run = None
