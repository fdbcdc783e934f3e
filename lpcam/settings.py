"""Settings that are checked once, where they are made: type, range, choices.

A group of settings that belong together is a frozen dataclass of pydantic's. Its ``asdict`` is what
a stage's key holds, so no key forgets one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from lpcam.errors import InputError

T = TypeVar("T")
C = TypeVar("C", bound=Collection[Any])


def _frozen(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


def _once(values: C) -> C:
    if len(set(values)) < len(values):
        raise ValueError("holds something twice; give each once")
    return values


def _ascending(values: C) -> C:
    if list(values) != sorted(values):
        raise ValueError("give the smaller value first")
    return values


def one_of(names: Collection[str]) -> AfterValidator:
    """What lets only these names pass, where they stand in a table and not in a type."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"choose from {', '.join(names)}")
        return value

    return AfterValidator(check)


# Nothing is converted: text is no number, and neither NaN nor infinity is one.
CHECKED = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", arbitrary_types_allowed=True)
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]  # of learning; torch's floats overflow far above
Scale = Annotated[float, Field(gt=0, le=8)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Pair = Annotated[tuple[T, T], BeforeValidator(_frozen), AfterValidator(_ascending)]
Names = Annotated[Sequence[Text], Field(min_length=1), AfterValidator(_once)]


def make(kind: Callable[..., T], values: Mapping[str, Any], key: Callable[[str], str] = str) -> T:
    """Make settings, or say in one line which value is wrong.

    Args:
        kind: The dataclass.
        values: Its fields.
        key: What the user calls a field.

    Raises:
        InputError: A value is of a wrong type, out of range, missing or unknown.
    """
    try:
        return kind(**{name: _frozen(value) for name, value in values.items()})
    except ValidationError as error:
        raise wrong_value(error, key) from error


def wrong_value(error: ValidationError, key: Callable[[str], str]) -> InputError:
    """The first thing that is wrong, as one line.

    Args:
        error: What pydantic says.
        key: What the user calls a field.
    """
    first = error.errors()[0]
    name, *inner = first["loc"]
    place = "".join(f"[{part}]" for part in inner if isinstance(part, int))
    missing = first["type"].startswith("missing") and not inner
    given = first["input"]
    if isinstance(given, tuple):  # to the user it is a list
        given = list(given)
    value = "" if missing else f"={given!r}"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if first["type"] == "sequence_str":
        message = f"should be a list: [{given}]"
    return InputError(f"{key(str(name))}{place}{value}: {message}")
