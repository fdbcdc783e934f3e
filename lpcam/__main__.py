"""The command ``lpcam``, and ``python -m lpcam``: programs, and tools beside them.

Imports nothing heavy until it is needed, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from lpcam.errors import InputError
from lpcam.explain.command import add_commands as add_explain
from lpcam.segmentation.command import add_command as add_segment
from lpcam.storage.command import add_command as add_store

# Their arguments are Hydra's, not argparse's.
PROGRAMS = {
    "train": "train the classifier, or a segmentation network",
    "infer": "make maps, masks, scores and a report; -m sweeps",
    "check": "look at a data set",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the command's name; the process's own by default.

    Returns:
        Exit status: 0, or 1 after a mistake of the user's, which is printed in one line. A mistyped
        option exits with 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in PROGRAMS:
        sys.argv[1:] = given[1:]
        # As if it had been started by itself: processes that it starts are started likewise.
        runpy.run_module(f"lpcam.programs.{given[0]}", run_name="__main__", alter_sys=True)
        return 0
    options = make_parser().parse_args(given)
    try:
        options.run(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options; ``run`` of the parsed ones is the command's function."""
    parser = argparse.ArgumentParser(
        "lpcam", description="Class activation maps from non-discriminative features as well."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in PROGRAMS.items():
        commands.add_parser(name, help=f"{text}; lpcam {name} --help lists the settings")
    add_explain(commands)
    add_segment(commands)
    add_store(commands)
    report = commands.add_parser("report", help="write the report of a run, or of a sweep's job")
    report.add_argument("folder", help="the run's folder")
    report.set_defaults(run=_report)
    summary = commands.add_parser("summary", help="write sweep.csv and sweep.html of a sweep")
    summary.add_argument("folder", help="the sweep's folder; the sweep may have been stopped")
    summary.add_argument("--split", help="whose scores; by default the last that has maps")
    summary.add_argument("--gallery", nargs="+", default=[], metavar="ID", help="pictures to show")
    summary.set_defaults(run=_summary)
    return parser


def _report(options: argparse.Namespace) -> None:
    import yaml

    folder = Path(options.folder)
    path = folder / ".hydra" / "overrides.yaml"
    overrides = yaml.safe_load(path.read_text())
    # Hydra writes none of its own settings there; somebody else's run could start anything by them.
    own = [str(o) for o in overrides if re.match(r"[+~]*hydra\b|-", str(o))]
    if own:
        raise InputError(f"{path}: {own[0]}: refused, no setting of a run; remove it")
    # Its folder keeps the overrides that it was made with, and W&B what it knows of it.
    extra = ["report=true", "logger=none", "hydra.mode=RUN", "hydra.output_subdir=null"]
    main(["infer", *overrides, *extra, f"hydra.run.dir={folder}"])


def _summary(options: argparse.Namespace) -> None:
    from lpcam.sweeps.summary import summarise

    summarise(Path(options.folder), options.split, options.gallery)


if __name__ == "__main__":
    sys.exit(main())
