"""Settings that are checked once, where they are made: type, range, choices.

A group of settings that belong together is a frozen dataclass of pydantic's. Its ``asdict`` is what
a stage's key holds, so no key forgets one.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from lpcam.errors import InputError

T = TypeVar("T")

# Nothing is converted: text is no number, and neither NaN nor infinity is one.
CHECKED = ConfigDict(strict=True, allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


def make(kind: Callable[..., T], values: Mapping[str, Any], key: Callable[[str], str] = str) -> T:
    """Make settings, or say in one line which value is wrong.

    Args:
        kind: The dataclass, or a function that checks its arguments likewise.
        values: Its fields.
        key: What the user calls a field.

    Raises:
        InputError: A value is of a wrong type, out of range, missing or unknown.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name, *inner = first["loc"]
        place = "".join(f"[{part}]" for part in inner if isinstance(part, int))
        message = first["msg"].removeprefix("Input ")
        raise InputError(f"{key(str(name))}{place}={first['input']!r}: {message}") from error
