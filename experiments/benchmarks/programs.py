"""``train.py`` and ``infer.py`` as processes, with a folder for all that they write."""

import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks.harness import ROOT, Options
from lpcam.programs.compose import infer_config
from lpcam.programs.run import Run

# Drawn pictures, where the embedded data would take too long.
TINY = (
    "dataset=shapes", "dataset.train=16", "dataset.val=8", "dataset.sizes=[112,128]",
    "classifier.epochs=5",
)  # fmt: skip
TINY_INFER = ("prototypes.k=2", "prototypes.allow_missing=true", "inference.scales=[1.0]")


def overrides(options: Options, folder: Path) -> list[str]:
    """What both programs are called with, to read the checkout's data and write to a folder."""
    kept = Path(os.environ.get("LPCAM_ROOT", ROOT)) / "data"
    return [
        f"paths.root={folder}",
        f"paths.data={folder / 'data' if options.quick else kept}",
        f"hydra.run.dir={folder / 'run'}",
        f"hydra.sweep.dir={folder / 'sweep'}",
        *(TINY if options.quick else ()),
    ]


def for_infer(options: Options) -> list[str]:
    """What ``infer.py`` alone is called with; a report takes longer than all else of a run."""
    return ["report=false", *(TINY_INFER if options.quick else ())]


def program(name: str, options: Options, *given: str) -> float:
    """Run a program to its end; the seconds that it took.

    Args:
        name: ``train`` or ``infer``.
        options: The options.
        *given: Overrides.
    """
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, str(ROOT / f"{name}.py"), *given]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - start


def prepare_features(given: list[str]) -> None:
    """Put the features to cluster into the store, as ``infer.py`` with these overrides would."""
    chosen = [text for text in given if not text.startswith("hydra.")]
    Run(infer_config(chosen, "outputs/benchmarks"), given).features  # noqa: B018 - computed where it is read
