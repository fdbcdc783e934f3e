"""From a config's nodes to objects and settings; what is wrong in them is one line."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import pydantic
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import AfterValidator, Field, ValidationError

from lpcam.errors import InputError
from lpcam.settings import CHECKED, Text, make, wrong_value

ALLOWED_MODULES = ("lpcam", "pytorch_lightning")
FUNCTIONS = ("lpcam.reporting.tracking.wandb_logger",)
T = TypeVar("T")


def _mixed(precision: int | str) -> int | str:
    """Views are normalised to single precision, which autocast alone takes to another."""
    if str(precision) not in ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed"):
        raise ValueError("choose 32-true, bf16-mixed or 16-mixed")
    return precision


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class TrainerSettings:
    """What Lightning takes without a look at it; the rest it checks itself.

    Attributes:
        devices: How many, which, or "auto".
        precision: What is computed in.
        enable_model_summary: Print the network's layers.
        log_every_n_steps: Steps between what is logged.
    """

    devices: int | Text | tuple[int, ...] = 1
    precision: Annotated[int | Text, AfterValidator(_mixed)] = "32-true"
    enable_model_summary: bool = False
    log_every_n_steps: Annotated[int, Field(ge=1)] = 10


def build(node: DictConfig, *arguments: Any, without: Collection[str] = ()) -> Any:
    """Instantiate the object that a config node describes by ``_target_``.

    Args:
        node: The node.
        arguments: Positional arguments that come before what the node gives; then a ``_partial_``
            node is called too.
        without: Names in the node that are meant for others.

    Raises:
        InputError: A value is missing or wrong, or the target lies outside the allowed modules and
            is not called.
    """
    described = {name: value for name, value in _plain(node).items() if name not in without}
    check_targets(described)
    if arguments:
        described["_partial_"] = False
    try:
        return instantiate(described, *arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        if isinstance(cause, ValidationError):  # a constructor that checks its arguments
            raise wrong_value(cause, node._get_full_key) from error
        raise


def _plain(node: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = error.full_key
        raise InputError(f"{name}: needs a value; add {name}=... to the command") from error


def trainer_maker(node: DictConfig) -> Callable[..., Any]:
    """What makes Lightning's trainers as a config says.

    Raises:
        InputError: Lightning refuses the config: no such device, or no such precision.
    """
    settings(TrainerSettings, node)
    make = build(node)

    def checked(**options: Any) -> Any:
        try:
            return make(**options)
        except Exception as error:  # of a dozen kinds, but all say what is wrong with the config
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            given = {name: value for name, value in _plain(node).items() if name[0] != "_"}
            named = [n for n, v in given.items() if n in line.lower() or str(v) in line.split()]
            names = ", ".join(f"{node._get_full_key(n)}={given[n]}" for n in named or given)
            raise InputError(f"{names}: {line}; trainer=cpu always works") from error

    from pytorch_lightning.plugins.environments import LightningEnvironment

    trainer = checked(logger=False, enable_checkpointing=False)  # told before anything is computed
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and not isinstance(environment, LightningEnvironment):
        trainer.strategy.setup_environment()  # torchrun or Slurm has started all processes
    return checked


def settings(kind: Callable[..., T], *nodes: DictConfig) -> T:
    """Make settings of the values that config nodes have under the names of their fields.

    Args:
        kind: The dataclass.
        nodes: The nodes; the first one that has a name gives its value.

    Raises:
        InputError: A value is wrong.
    """
    values, keys = {}, {}
    for node in reversed(nodes):
        plain = _plain(node)
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in plain:
                values[field.name] = plain[field.name]
                keys[field.name] = node._get_full_key(field.name)
    return make(kind, values, lambda name: keys.get(name, name))


def check_targets(value: Any) -> None:
    """Make sure of every ``_target_`` in a plain value.

    Only classes are called: among the functions of this package are some that delete folders.

    Raises:
        InputError: One is no class of the allowed modules.
    """
    if isinstance(value, list):
        for item in value:
            check_targets(item)
    if not isinstance(value, Mapping):
        return
    for item in value.values():
        check_targets(item)
    target = value.get("_target_")
    if target is None:
        return
    allowed = str(target).split(".")[0] in ALLOWED_MODULES
    if allowed:
        try:
            found = get_object(target)
        except Exception as error:
            raise InputError(f"_target_={target}: no such class; correct the name") from error
        # A module of ours that imports os would make os reachable under our name.
        module = str(getattr(found, "__module__", ""))
        allowed = module.split(".")[0] in ALLOWED_MODULES and module != "pytorch_lightning.cli"
        allowed = allowed and (isinstance(found, type) or target in FUNCTIONS)
    if not allowed:
        raise InputError(
            f"_target_={target}: refused, only classes of {' and '.join(ALLOWED_MODULES)} are "
            "called; correct the config"
        )
