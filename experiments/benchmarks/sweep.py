"""48 settings beside one, and a 49th after them: ``infer.py`` with its features and classifier.

Everything is started as a user does: the seconds are those of whole processes, with W&B offline.
"""

import shutil
import tempfile
from pathlib import Path

from experiments.benchmarks.harness import Options, Row, section, target
from experiments.benchmarks.programs import for_infer, overrides, prepare_features, program

ONE, MANY, NEXT = "one setting", "48 settings", "a 49th setting, after them"


def table(options: Options) -> list[Row]:
    """A run, the grid of ``experiments/sweep_thresholds.yaml`` and a setting that is not in it."""
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "one"), Path(name, "many")
        given = overrides(options, Path(name))
        program("train", options, *given)
        given += for_infer(options)
        prepare_features(given)
        for folder in (first, second):
            shutil.copytree(Path(name, "store"), folder)
        one = [*given, f"paths.store={first}"]
        many = [*given, f"paths.store={second}"]
        grid = ["experiments=sweep_thresholds"]
        if options.quick:
            grid += ["thresholds.activation=0.1", "thresholds.class_score=0.5,0.9"]
        seconds = {
            ONE: program("infer", options, *one, "thresholds.activation=0.1"),
            MANY: program("infer", options, *many, *grid),
            NEXT: program(
                "infer", options, *many, "thresholds.class_score=0.85",
                f"hydra.run.dir={Path(name, 'next')}",
            ),
        }  # fmt: skip
    rows: list[Row] = [{"name": name, "seconds": took} for name, took in seconds.items()]
    text = (
        "The embedded data, 300 + 100 pictures, frozen EfficientNet-Lite0; classifier and features "
        "are there before. One run each."
    )
    targets = [
        target("48 settings / one", seconds[MANY] / seconds[ONE], most=1.5),
        target("the 49th / one", seconds[NEXT] / seconds[ONE], most=0.08),
    ]
    return [section("Sweep", text, rows, targets=targets, value="seconds")]
