"""What the command-line programs share: how they start, and how a mistake ends them.

Imports nothing heavy, so that ``--help`` and a mistyped override answer at once.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lpcam.errors import InputError
from lpcam.programs.folders import PROJECT
from lpcam.programs.foreign import check_folders, check_secrets
from lpcam.programs.options import options

USER_ERRORS = (InputError, HydraException, OmegaConfBaseException, YAMLError, OSError)
FAILED = "FAILED.txt"  # a failed job's one line, in its folder
# What to do if a launcher gives a sweep up: Hydra tells no callback then, so the sweep's sets it.
given_up: Callable[[], Any] | None = None


def run(main: Callable[[], Any]) -> None:
    """Run a Hydra program; a mistake of the user's ends it with one line and status 1.

    Set ``HYDRA_FULL_ERROR=1`` to see the traceback instead.

    Args:
        main: The function that ``hydra.main`` decorated.
    """
    global given_up
    given_up = None
    # A launcher's processes read the same configs, and know of this one only by its environment.
    os.environ["LPCAM_PROJECT"] = str(PROJECT)
    os.environ["LPCAM_SWEEP"] = _sweep_name(sys.argv[1:])
    logging.captureWarnings(True)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    # Lightning's advice is meant for training on pictures, not for a head on features; the pytree
    # notice is about its own code.
    advice = (
        "many workers|number of training batches|infer the batch indices|LeafSpec|in eval mode|"
        "command is available on your system"  # srun, on the node that starts a study
    )
    warnings.filterwarnings("ignore", f".*({advice}).*")
    if _wants_traceback():
        check_folders(sys.argv[1:])
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints many lines and exits by itself
    try:
        check_folders(sys.argv[1:])
        main()
    except USER_ERRORS as error:
        _exit(error)
    except Exception as error:
        if given_up is None:
            raise
        # Jobs leave their own errors in their folders: this is the launcher's, which lost one.
        print(f"error: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        with contextlib.suppress(InputError):  # no job has begun
            given_up()
        sys.exit(1)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = "0"


def job(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate what ``hydra.main`` runs: a mistake of the user's ends a single run with one line.

    A job of a sweep leaves that line in its folder instead, so that the other jobs go on.
    """

    @functools.wraps(function)
    def run_one(cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            try:
                return _checked(function, cfg)
            except USER_ERRORS as error:
                # Hydra would print a line of its own before raising this.
                _exit(error)
        folder = Path(hydra_config.runtime.output_dir)
        failure = folder / FAILED
        failure.unlink(missing_ok=True)
        try:
            _refuse_ranks(cfg)
            _refuse_one_folder(hydra_config.overrides.task)
            return _checked(function, cfg)
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
            if isinstance(error, USER_ERRORS):
                line = _one_line(error)
            else:
                traceback.print_exc()
            failure.write_text(line + "\n")
            print(f"error: {folder.name}: {line}", file=sys.stderr)
            # Hydra's own sweeper would stop at an exception; others take it for the job's result.
            # Without the callback that tells of failures nothing else would end with status 1.
            basic = hydra_config.sweeper._target_.endswith("BasicSweeper")
            if not basic or "sweep" not in (hydra_config.callbacks or {}):
                raise
            return None

    return run_one


def _checked(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Call a program once its options are known to be right, and say which disk is full if one is.

    Raises:
        InputError: An option is wrong.
        OSError: No space is left; its file is a folder of the config's.
    """
    check_secrets(cfg)
    found = options(cfg)
    os.makedirs(found.output, exist_ok=True)  # where it cannot be, say so at once
    try:
        return function(cfg)
    except Exception as error:
        if "DataLoader worker" in str(error):  # was killed by a signal, or exited unexpectedly
            given = "null" if cfg.num_workers is None else cfg.num_workers
            raise InputError(
                f"num_workers={given}: a process that decodes pictures was killed, as for want of "
                "memory; set a lower one, and see whether /dev/shm is full"
            ) from error
        if isinstance(error, InputError) or getattr(error, "filename", None) is not None:
            raise
        # A failing write knows no file, and libraries have errors of their own for it.
        folders = [f for f in (found.store, found.output, found.data) if os.path.isdir(f)]
        free, folder = min((shutil.disk_usage(f).free, f) for f in folders)
        if free < 2**20 or getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder) from error
        raise


def _refuse_ranks(cfg: DictConfig) -> None:
    """A sweep's job on several devices needs a launcher that starts every rank by itself."""
    strategy = str(cfg.get("trainer", {}).get("strategy", ""))
    if strategy.startswith("ddp") and "SLURM_PROCID" not in os.environ:
        raise InputError(
            "trainer=ddp: each rank would start the whole sweep again; use trainer=gpu, or "
            "hydra/launcher=submitit_slurm with as many tasks_per_node as devices"
        )


def _refuse_one_folder(overrides: Sequence[str]) -> None:
    """Jobs that write into one folder would overwrite each other."""
    given = next((o for o in overrides if o.startswith("paths.output=")), None)
    if given is not None:
        raise InputError(
            f"{given}: one folder for all jobs of a sweep; leave it out, or say where the sweep's "
            "folder goes with hydra.sweep.dir=..."
        )


def _sweep_name(arguments: Sequence[str]) -> str:
    """A folder name that is the same when the same sweep is started again."""
    overrides = [o for o in arguments if not o.startswith(("hydra", "-"))]
    studies = next((o for o in overrides if o.startswith("experiments=")), "=sweep")
    study = "-".join(re.findall(r"\w+", studies.split("=")[1]))  # one, or a list of several
    return f"{study}-{_short_hash(overrides)[:6]}"


def _short_hash(overrides: Sequence[str]) -> str:
    """A folder name that is the same when a job with the same overrides is started again."""
    return hashlib.sha256(shlex.join(sorted(overrides)).encode()).hexdigest()[:10]


OmegaConf.register_new_resolver("short_hash", _short_hash, replace=True)


def _wants_traceback() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _exit(error: Exception) -> NoReturn:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(1)


def command_line(
    program: str, overrides: Sequence[str], groups: Sequence[str] | None = None
) -> str:
    """The command that runs a program with a job's overrides.

    Args:
        program: ``train`` or ``infer``.
        overrides: The job's overrides.
        groups: Only those of these config groups and values.
    """
    wanted = [
        override
        for override in overrides
        if groups is None or re.split(r"[.=@]", override.lstrip("+~"))[0] in groups
    ]
    return shlex.join(["python", f"{program}.py", *wanted])


def choices() -> dict[str, str]:
    """The option that this job chose in each config group; groups without one are left out."""
    chosen = HydraConfig.get().runtime.choices
    return {
        group: str(chosen[group]) for group in chosen if "hydra/" not in group and chosen[group]
    }


def _one_line(error: BaseException) -> str:
    """The cause of an error in one line; Hydra's own say little without what caused them."""
    if isinstance(error, OSError) and error.strerror is not None:
        remedy = "check that it is there, and may be read and written"
        if error.errno == errno.ENOSPC:
            remedy = "free some space, or set paths.root (data, store) or hydra.run.dir elsewhere"
        path = error.filename2 or error.filename  # what is moved goes to the second
        where = "" if path is None else f"{path}: "
        return f"{where}{error.strerror}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        lines = [*lines[:1], *str(error.__cause__).splitlines()[:1]]
    if lines and (isinstance(error, InputError) or lines[0].startswith("Caught ")):
        # A loader's process hands its whole traceback over; the message is the last line of it.
        lines = [lines[-1].removeprefix(f"{InputError.__module__}.InputError: ")]
    return " ".join(lines[:2])
