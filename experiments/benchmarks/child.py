"""The process that :func:`~experiments.benchmarks.harness.in_child` starts."""

import json
import sys

from experiments.benchmarks.harness import run_child

if __name__ == "__main__":
    print(json.dumps(run_child(sys.argv[1])))
