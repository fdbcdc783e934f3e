"""Writes ``data_files/golden_run.json``: ``python -m tests.golden``.

The file changes only together with a line in CHANGELOG.md that says why figures moved.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT, TINY, TINY_INFER, TINY_TRAIN, at

FILE = Path(__file__).parent / "data_files" / "golden_run.json"


def write() -> None:
    """Train and map on the drawn data, and keep the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, options in (("train", TINY_TRAIN), ("infer", TINY_INFER)):
            words = [sys.executable, f"{name}.py", *TINY, *options, *at(root, name)]
            subprocess.run(words, cwd=ROOT, check=True)
        metrics = json.loads((root / "infer" / "metrics.json").read_text())
    rounded = {key: round(value, 4) for key, value in sorted(metrics.items())}
    FILE.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    write()
