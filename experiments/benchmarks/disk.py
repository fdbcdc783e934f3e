"""What a map takes on the disk: LPCAM's records beside arrays of the picture's size."""

import io
import tempfile
from pathlib import Path

import numpy as np

from experiments.benchmarks.harness import Options, Row, section
from experiments.benchmarks.programs import for_infer, overrides, program
from lpcam.seeds.record import load_seed

# Pictures of the embedded data that are trained on and that get maps.
SMALLER = ("dataset.train=60", "dataset.val=24", "dataset.map_splits=[val]")


def table(options: Options) -> list[Row]:
    """Bytes of the maps that ``infer.py`` leaves for pictures of the embedded data."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [*overrides(options, folder), "logger=none"]
        if not options.quick:
            given += SMALLER
        program("train", options, *given)
        program("infer", options, *given, *for_infer(options))
        files = sorted((folder / "run" / "maps").glob("*.npz"))
        sizes = [(path.stat().st_size, load_seed(path)) for path in files]
    maps = sum(len(seed.keys) for _, seed in sizes)
    full = sum(_bytes(seed.full_size().numpy()) for _, seed in sizes)
    pixels = sum(seed.size[0] * seed.size[1] for _, seed in sizes) / len(sizes)
    ours = sum(size for size, _ in sizes)
    rows = [
        {"name": "record of LPCAM: stride 4, half precision, compressed", "bytes": ours / maps},
        {"name": "array of the picture's size, single precision", "bytes": full / maps},
    ]
    text = (
        f"{len(files)} pictures with {maps} maps, {pixels:.0f} pixels each on average; an array "
        f"takes {full / ours:.0f} times as much."
    )
    return [section("Disk", text, rows, value="bytes")]


def _bytes(array: np.ndarray) -> int:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return len(buffer.getvalue())
