"""Programs run in this process, on a tiny drawn data set and a tiny network."""

import os
import runpy
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytorch_lightning import seed_everything

ROOT = Path(__file__).parents[1]
TINY = (
    "dataset=shapes",
    "dataset.train=16",
    "dataset.val=8",
    "dataset.sizes=[112,128]",
    "trainer=cpu",
    "logger=none",
    "num_workers=0",
)
TINY_TRAIN = ("classifier.epochs=100", "classifier.validate_every=25", "classifier.batch_size=8")
TINY_INFER = (
    *TINY_TRAIN,
    "prototypes.k=2",
    "thresholds.activation=0.3",
    "inference.scales=[0.5,1.0]",
)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A failing test fails again, in any order and on any worker."""
    seed_everything(0, verbose=False)


def unpacked(folder: Path) -> dict[str, bytes]:
    """All records of a stage's folder by name, as anything that knows tar finds them."""
    found = {}
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Run ``train`` or ``infer`` with overrides, as its command line would."""
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(name: str, *overrides: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *overrides])
        os.environ.pop("HYDRA_FULL_ERROR", None)
        GlobalHydra.instance().clear()
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    yield call
    os.environ.pop("HYDRA_FULL_ERROR", None)
    GlobalHydra.instance().clear()


def at(root: Path, output: str = "run") -> tuple[str, str]:
    """Overrides that put everything a run writes below a folder."""
    return f"paths.root={root}", f"hydra.run.dir={root / output}"
