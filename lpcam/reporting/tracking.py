"""Logging a run, to Weights & Biases above all. Results never depend on it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytorch_lightning.loggers import Logger, WandbLogger


def wandb_logger(
    folder: str, project: str, *, group: str | None = None, tags: Sequence[str] = ()
) -> WandbLogger:
    """A W&B logger that needs no account.

    When nobody is logged in the run is recorded offline, and one line says how to send it later.

    Args:
        folder: The run's folder; W&B makes a folder ``wandb`` in it.
        project: W&B project.
        group: Runs that belong together.
        tags: Tags of the run.
    """
    import wandb

    offline = os.environ.get("WANDB_MODE") == "offline" or not wandb.login(prompt=False)
    os.environ.setdefault("WANDB_SILENT", "true")
    Path(folder).mkdir(parents=True, exist_ok=True)
    if offline:
        wandb.teardown()  # the question above would count as an attempt to be online
        print(f"W&B: not logged in, recording offline; send it with  wandb sync {folder}/wandb/*")
    return WandbLogger(
        project=project, save_dir=folder, offline=offline, group=group, tags=list(tags)
    )


def log_results(logger: Logger, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
    """Log a finished run's metrics and, to W&B, its figures."""
    logger.log_metrics(dict(metrics))
    if isinstance(logger, WandbLogger):
        for figure in figures:
            logger.log_image(f"figures/{figure.stem}", [str(figure)])
    logger.save()


def finish(logger: Logger | None) -> None:
    """End the run; without it the next job of a sweep would go on writing to this one."""
    if isinstance(logger, WandbLogger):
        import wandb

        wandb.finish()
