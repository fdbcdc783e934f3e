"""The floors of the house: a file imports from its own room and from rooms below it."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The top floor first, as in the README.
ROOMS = (
    "__main__", "sweeps", "programs", "stages", "explain", "segmentation", "refiners", "reporting",
    "hosts", "models", "data", "prototypes", "visualize", "seeds", "storage", "evaluation",
    "settings", "functional", "errors",
)  # fmt: skip
FILES = sorted((ROOT / "lpcam").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "lpcam").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Names of the rooms that a file imports from, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {parts[1] for name in names if (parts := name.split("."))[0] == "lpcam" and parts[1:]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path: Path) -> None:
    if path == ROOT / "lpcam" / "__init__.py":  # the package itself names its one class
        assert imported(path) == {"explain"}
        return
    here = ROOMS.index(room(path))
    above = {name for name in imported(path) & set(ROOMS) if ROOMS.index(name) < here}
    assert not above


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} == {*ROOMS, "__init__"}


def test_heavy_programs_stay_off_the_top() -> None:
    """Neither hydra nor wandb is imported by what a library user imports."""
    for path in FILES:
        if room(path) in ("programs", "sweeps"):
            continue
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
        assert not {alias.name for node in top for alias in node.names} & {"hydra", "wandb"}
