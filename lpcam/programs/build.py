"""From a config's nodes to objects and settings; what is wrong in them is one line."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lpcam.errors import InputError

ALLOWED_MODULES = ("lpcam", "pytorch_lightning")
T = TypeVar("T")


def build(node: DictConfig) -> Any:
    """Instantiate the object that a config node describes by ``_target_``.

    Args:
        node: The node.

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
        return instantiate(plain, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def settings(kind: Callable[..., T], *nodes: DictConfig) -> T:
    """Make settings of the values that config nodes have under the names of their fields.

    Args:
        kind: The dataclass.
        nodes: The nodes; the first one that has a name gives its value.

    Raises:
        InputError: A value is wrong.
    """
    from lpcam.settings import make

    values, keys = {}, {}
    for node in reversed(nodes):
        plain: Any = OmegaConf.to_container(node, resolve=True)
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in plain:
                values[field.name] = plain[field.name]
                keys[field.name] = node._get_full_key(field.name)
    return make(kind, values, lambda name: keys.get(name, name))


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
