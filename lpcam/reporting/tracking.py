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

from pytorch_lightning.loggers import Logger, WandbLogger

from lpcam.errors import InputError
from lpcam.storage.files import write_atomically
from lpcam.storage.ranks import is_main_process

OWN_DATA_DIR = "WANDB_DATA_DIR" not in os.environ
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
        summarise(logger, summaries or {})
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


def summarise(logger: WandbLogger, summaries: Mapping[str, str]) -> None:
    """Tell W&B how metrics are summarised, ``max`` or ``min``, by name."""
    for key, summary in summaries.items():
        logger.experiment.define_metric(key, STEP, step_sync=True, summary=summary)


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
