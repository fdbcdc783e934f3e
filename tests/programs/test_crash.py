"""Whatever a crash cuts in two, the same command finishes, and finds what it would have found."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lpcam.storage.store import verify
from tests.conftest import TINY
from tests.crash import Crashing

SMALL = (
    *(option for option in TINY if not option.startswith(("dataset.train", "dataset.val"))),
    "dataset.train=8",
    "dataset.val=4",
    "backbone=timm",
    "backbone.name=test_resnet",
    "backbone.weights=null",
    "classifier.batch_size=3",
)
TRAIN = ("classifier.epochs=4", "classifier.validate_every=1")
FINETUNE = (
    "classifier=finetune",
    "classifier.epochs=3",
    "classifier.crop=64",
    "classifier.long_side=[64,96]",
    "classifier.batch_size=3",
    "classifier.lr=1e-3",
)
INFER = (
    "prototypes.k=1",
    "prototypes.allow_missing=true",
    "thresholds.class_score=0",
    "inference.scales=[0.5,1.0]",
)
LEARNING = ("refiner=irn", "refiner.epochs=2", "refiner.crop=80", "refiner.batch_size=3")
# What is run, after which training, and what of its files has to be equal to the byte.
COMMANDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "train": ("train", TRAIN, ()),
    "finetune": ("train", FINETUNE, ()),
    "infer": ("infer", (*TRAIN, *INFER, "refiner=par"), TRAIN),
    "irn": ("infer", (*TRAIN, *INFER, *LEARNING, "report=false"), TRAIN),
    "sweep": (
        "infer",
        ("-m", *TRAIN, *INFER, "prototypes.use=both,class", "report=false"),
        TRAIN,
    ),
}


@pytest.fixture(scope="module")
def crashing() -> Iterator[Crashing]:
    with Crashing() as server:
        yield server


def found(root: Path) -> dict[str, object]:
    """Weights of the classifier, and metrics, maps and masks of the run.

    The store's keys are others in each folder, for they hold the times of the pictures' files, and
    so are the names of a sweep's jobs, for they hold the folder's name.
    """
    jobs = {
        path.parents[1].name: "class" if "use=class" in path.read_text() else "both"
        for path in root.glob("run/*/.hydra/overrides.yaml")
    }
    results: dict[str, object] = {}
    for path in sorted(root.glob("store/classifier/*/last.ckpt")):
        state = torch.load(path, weights_only=True)["state_dict"]
        results[path.name] = {key: value.numpy().tobytes() for key, value in state.items()}
    for path in sorted((root / "run").rglob("*")):
        parts = path.relative_to(root / "run").parts
        name = "/".join(jobs.get(part, part) for part in parts)
        if path.name == "metrics.json":
            results[name] = json.loads(path.read_text())
        elif path.suffix in (".npz", ".png") and path.parent.name != "figures":
            results[name] = path.read_bytes()
    return results


def command(name: str, root: Path) -> tuple[str, tuple[str, ...]]:
    program, options, _ = COMMANDS[name]
    folder = "hydra.sweep.dir" if "-m" in options else "hydra.run.dir"
    return program, (*options, *SMALL, f"paths.root={root}", f"{folder}={root / 'run'}")


def crash_and_compare(
    crashing: Crashing, tmp_path: Path, name: str, seed: int, chains: int
) -> list[str]:
    """Kill a command three times on its way, and again on fresh folders; what it died before."""
    rng = np.random.default_rng(seed)
    _, _, before = COMMANDS[name]

    def fresh(folder: str) -> Path:
        root = tmp_path / folder
        root.mkdir()
        if before:
            run = f"hydra.run.dir={root / 'before'}"
            crashing.run("train", root, *before, *SMALL, f"paths.root={root}", run)
        return root

    whole = fresh("whole")
    program, words = command(name, whole)
    events = int(crashing.run(program, whole, *words))
    expected = found(whole)
    died = []
    for chain in range(chains):
        root = fresh(f"cut{chain}")
        program, words = command(name, root)
        for _ in range(3):
            said = crashing.run(program, root, *words, kill=int(rng.integers(1, events + 1)))
            if not said.isdigit():
                died.append(said)
        crashing.run(program, root, *words)
        results = found(root)
        assert results.keys() == expected.keys()
        assert not [key for key in results if results[key] != expected[key]]
        assert not any(verify(root / "store").values())
        assert not list(root.glob("store/*/*.partial"))
        assert not [p for p in root.glob("store/*/*/**/.*") if p.is_file()]
    return died


@pytest.mark.parametrize("name", ["train", "infer"])
def test_a_few_crashes(crashing: Crashing, tmp_path: Path, name: str) -> None:
    assert crash_and_compare(crashing, tmp_path, name, seed=1, chains=1)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", COMMANDS)
def test_many_crashes(crashing: Crashing, tmp_path: Path, name: str) -> None:
    died = crash_and_compare(crashing, tmp_path, name, seed=2, chains=8)
    assert len(died) > 12
    print(name, len(died), sorted(set(died)))
