"""``python -m experiments.benchmarks [NAME ...]``: measures, and writes tables and a picture."""

import argparse
import importlib
import json
import time
from pathlib import Path

import torch

from experiments.benchmarks.harness import ROOT, Options, machine
from experiments.benchmarks.results import write

TABLES = (
    "head", "kmeans", "random_walk", "thresholds", "disk", "whole_pass", "scale", "sweep",
)  # fmt: skip
LONG = "sweep"


def main() -> None:
    """Make the tables that are named; without names all, the sweep if it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--sweep", action="store_true", help="the sweep too, which takes longest")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=Options().threads)
    parser.add_argument("--output", type=Path, help="where results go")
    given = parser.parse_args()
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}")
    # What is quick must not take the place of what was measured.
    default = ROOT / "build" / "benchmarks" if given.quick else Path(__file__).parent
    folder = given.output or default
    options = Options(given.quick, given.device, given.threads)
    torch.set_num_threads(options.threads)
    wanted = given.tables or [name for name in TABLES if name != LONG or given.sweep]
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for name in wanted:
        start = time.perf_counter()
        sections = importlib.import_module(f"{__package__}.{name}").table(options)
        found = {
            "table": name,
            "quick": options.quick,
            "seconds": time.perf_counter() - start,
            "machine": machine(options),
            "sections": sections,
        }
        # On a GPU the same tables say something else.
        suffix = "" if options.device == "cpu" else f"_{options.device}"
        path = folder / "results" / f"{name}{suffix}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        write(folder)
        print(f"{name}: {found['seconds']:.0f} s, {path}", flush=True)


if __name__ == "__main__":
    main()
