"""What the command-line programs share: one-line errors, and objects from configs.

Imports nothing heavy, so that ``--help`` and a mistyped override answer at once.
"""

import functools
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lpcam.errors import InputError

USER_ERRORS = (InputError, HydraException, OmegaConfBaseException)
ALLOWED_MODULES = ("lpcam", "pytorch_lightning")


def run(main: Callable[[], Any], project_root: Path) -> None:
    """Run a Hydra program; a mistake of the user's ends it with one line and status 1.

    Set ``HYDRA_FULL_ERROR=1`` to see the traceback instead.

    Args:
        main: The function that ``hydra.main`` decorated.
        project_root: The folder that holds ``experiments``.
    """
    OmegaConf.register_new_resolver("project_root", lambda: str(project_root), replace=True)
    logging.captureWarnings(True)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    # Lightning's advice is meant for training on pictures, not for a head on features; the pytree
    # notice is about its own code.
    advice = "many workers|number of training batches|infer the batch indices|LeafSpec|in eval mode"
    warnings.filterwarnings("ignore", f".*({advice}).*")
    if _wants_traceback():
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints many lines and exits by itself
    try:
        main()
    except USER_ERRORS as error:
        _exit(error)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = "0"


def job(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate what ``hydra.main`` runs: a mistake of the user's ends a single run with one line.

    A job of a sweep raises it instead, so that the other jobs go on.
    """

    @functools.wraps(function)
    def run_one(cfg: DictConfig) -> Any:
        try:
            return function(cfg)
        except USER_ERRORS as error:
            # Hydra would print a line of its own before raising this.
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _exit(error)

    return run_one


def _wants_traceback() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _exit(error: Exception) -> NoReturn:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(1)


def command_line(program: str, groups: Sequence[str] | None = None) -> str:
    """The command that runs a program with this job's overrides.

    Args:
        program: ``train`` or ``infer``.
        groups: Only overrides of these config groups and values.
    """
    overrides = [
        override
        for override in HydraConfig.get().overrides.task
        if groups is None or re.split(r"[.=@]", override.lstrip("+~"))[0] in groups
    ]
    return shlex.join(["python", f"{program}.py", *overrides])


def choices() -> dict[str, str]:
    """The option that this job chose in each config group; groups without one are left out."""
    chosen = HydraConfig.get().runtime.choices
    return {
        group: str(chosen[group]) for group in chosen if "hydra/" not in group and chosen[group]
    }


def _one_line(error: BaseException) -> str:
    """The cause of an error in one line; Hydra's own say little without what caused them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        lines = [*lines[:1], *str(error.__cause__).splitlines()[:1]]
    if isinstance(error, InputError):
        # From a process that decodes pictures it comes with that process's traceback before it.
        lines = [lines[-1].removeprefix(f"{InputError.__module__}.InputError: ")]
    return " ".join(lines[:2])


def build(node: DictConfig, **kwargs: Any) -> Any:
    """Instantiate the object that a config node describes by ``_target_``.

    Args:
        node: The node.
        **kwargs: Further arguments.

    Raises:
        InputError: A value is missing, or the target lies outside the allowed modules and is not
            called.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = node._get_full_key(error.full_key)
        raise InputError(f"{name}: needs a value; add {name}=... to the command") from error
    _check_targets(plain)
    try:
        return instantiate(plain, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def _check_targets(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check_targets(item)
    if not isinstance(value, Mapping):
        return
    for item in value.values():
        _check_targets(item)
    target = value.get("_target_")
    if target is None:
        return
    allowed = str(target).split(".")[0] in ALLOWED_MODULES
    if allowed:
        try:
            # A module of ours that imports os would make os reachable under our name.
            origin = str(get_object(target).__module__).split(".")[0]
            allowed = origin in ALLOWED_MODULES
        except Exception as error:
            raise InputError(f"_target_={target}: no such class; correct the name") from error
    if not allowed:
        raise InputError(
            f"_target_={target}: refused, only classes of {' and '.join(ALLOWED_MODULES)} are "
            "called; correct the config"
        )
