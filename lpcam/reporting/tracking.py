"""Logging a run, to Weights & Biases above all.

Results never depend on it: whatever a logger fails at costs one line on the terminal, and a server
that is away a bounded wait. A W&B run has the scores under the names of ``metrics.json``, and for
each split ``<split>/curve``, the scores at every threshold, and ``<split>/classes``, the IoU of
each class; ``pictures/<id>`` and ``overlays/<id>`` show the same pictures in every run.
"""

import contextlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from lpcam.errors import InputError
from lpcam.storage.files import write_atomically
from lpcam.storage.ranks import is_main_process

OWN_DATA_DIR = "WANDB_DATA_DIR" not in os.environ
STEP = "trainer/global_step"  # the step of all that Lightning logs
# Seconds that W&B gets to start a run, to answer a question, and to send what is left at the end:
# 300 MB, the checkpoint of a large backbone, pass in two minutes at 20 Mbit/s.
# (More than 15, for W&B writes to disk that often.)
STARTING, ANSWERING, SENDING = 30, 3, 120
# Seconds for which jobs are recorded offline after a failure: each would wait for as long again.
PAUSE = 600.0
_outage = ("", 0.0)  # why W&B's server is left alone, and until when


def wandb_logger(
    folder: str,
    project: str,
    *,
    group: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] = (),
) -> WandbLogger:
    """A W&B logger that needs no account.

    When nobody is logged in, or the server does not answer, the run is recorded offline, and one
    line says why and how to send it later.
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

    mode, why = _mode()
    Path(folder).mkdir(parents=True, exist_ok=True)
    if mode == "offline":
        _tell_offline(folder, why)
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
            init_timeout=STARTING,
            x_graphql_retry_max=20,  # W&B's own values: what is sent outlives a short outage
            x_graphql_timeout_seconds=30,
        ),
    )


def _mode() -> tuple[str, str]:
    """How the next run is recorded, and why offline."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        return mode, ""
    if mode != "online":
        return "offline", f"WANDB_MODE={mode}"
    cause, until = _outage
    if time.monotonic() < until:
        return "offline", cause
    try:
        # Asked twice: W&B's 20 tries outlast its own 10 s, and then it cannot name the cause.
        wandb.setup(wandb.Settings(x_graphql_retry_max=1, x_graphql_timeout_seconds=ANSWERING))
        return ("online", "") if wandb.login(prompt=False) else ("offline", "not logged in")
    except wandb.Error as error:
        return "offline", _pause(error)


def _pause(error: Exception) -> str:
    """Leave W&B's server alone for a while; give the cause as one line."""
    global _outage
    _outage = (_line(error), time.monotonic() + PAUSE)
    return _outage[0]


def _tell_offline(folder: str, why: str) -> None:
    print(f"W&B: {why}; recording offline, send it with  wandb sync {folder}/wandb/offline-run-*")


def _run_id(folder: Path) -> str | None:
    """The id of the run in a folder, kept unless the run was finished; None but for rank 0."""
    if not is_main_process():
        return None
    path = folder / "wandb_id.txt"
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        write_atomically(path, os.environ["WANDB_RUN_ID"])  # the agent of a W&B sweep chose it
        return os.environ["WANDB_RUN_ID"]
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
    if isinstance(logger, WandbLogger):
        _begin(logger)
    logger.log_hyperparams(flat)
    if isinstance(logger, WandbLogger):
        logger.experiment.name = run_name(flat)
        summarise(logger, summaries or {})
    return logger


def _begin(logger: WandbLogger) -> None:
    """Start W&B's run, offline if its server fails."""
    import wandb

    options = logger._wandb_init
    try:
        _ = logger.experiment
    except wandb.Error as error:
        if options["mode"] != "online":
            raise
        _drop_service()  # it holds the run's id
        _tell_offline(options["dir"], _pause(error))
        options["mode"] = "offline"
        _ = logger.experiment
    if options["mode"] == "online":
        # W&B asks its server before it records a table or a file. Once connected it records them
        # without an answer, too, so that they can be sent later.
        logger.experiment._public_api()


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
    if "segmenter/architecture" in flat:
        masks = str(flat.get("masks")).rstrip("/").rpartition("/")[2]
        return f"{flat.get('segmenter')} {flat.get('backbone')} on {masks} seed{flat.get('seed')}"
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
        failed = sys.exception() is not None
        with tolerated():
            _end(failed)


def _end(failed: bool) -> None:
    """End W&B's run; what could not be sent in time stays in its folder."""
    import wandb

    run = wandb.run
    if run is None:
        return
    late = threading.Event()

    def give_up() -> None:
        # W&B's finish_timeout starts when its process gets to the end of the run, and each question
        # to a dead server before it may take a quarter of an hour. Without its process finish()
        # returns, and so does what W&B does when this one exits.
        late.set()
        _kill_service()

    timer = threading.Timer(SENDING, give_up)
    timer.daemon = True
    timer.start()
    try:
        wandb.finish(exit_code=int(failed))
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        _drop_service()
        why = _pause(TimeoutError(f"its server did not take a run in {SENDING} s"))
        later = f"send it with  wandb sync --include-online {run.settings.sync_dir}"
        print(f"warning: W&B: {why}, results are not affected; {later}", file=sys.stderr)


def _kill_service() -> None:
    """Kill W&B's process; what it was given lies on disk."""
    from wandb.sdk import wandb_setup

    service = wandb_setup.singleton()._connection
    if service and service._proc:
        service._proc._process.kill()


def _drop_service() -> None:
    """Part with W&B's process, which waits or does not answer: the next run gets another."""
    import wandb

    _kill_service()
    with contextlib.suppress(Exception, SystemExit):  # exits with the status of what was killed
        wandb.teardown()
    wandb.run = None


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
        warn(error)
        if "wandb" in sys.modules:
            import wandb

            with contextlib.suppress(Exception):
                _end(failed=True)
            if wandb.run is not None:
                _drop_service()


def warn(error: Exception, what: str = "") -> None:
    """Make one line of what a logger failed at.

    Args:
        error: The failure.
        what: The part that is not logged; everything by default.
    """
    line = _line(error)
    if not isinstance(error, InputError):
        line = f"{type(error).__name__}: {line}"
    print(f"warning: {what}not logged, results are not affected: {line}", file=sys.stderr)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
