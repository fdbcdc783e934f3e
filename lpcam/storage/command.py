"""``lpcam store list|verify|prune``: what the store holds, whether it is sound, what may go."""

import argparse
from pathlib import Path
from typing import Any

from lpcam.errors import InputError


def add_command(commands: Any) -> None:
    """Add the command to a parser's subparsers."""
    parser = commands.add_parser("store", help="list what the store holds, check it, free it")
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("--root", type=Path, default=Path("store"), help="the store's folder")
    parser.add_argument("--stage", help="only results of this kind, such as views")
    parser.add_argument("--days", type=float, default=0, help="prune: only what is so old")
    parser.add_argument("--partial", action="store_true", help="prune: only unfinished results")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """List, verify or prune.

    Args:
        options: The parsed command line.

    Raises:
        InputError: There is no such store.
    """
    from lpcam.storage.store import prune

    if not options.root.is_dir():
        raise InputError(f"{options.root}: no such store; give --root")
    if options.action == "list":
        _print_results(options.root, options.stage)
        return
    if options.action == "verify":
        _verify(options.root)
        return
    freed = prune(options.root, stage=options.stage, days=options.days, partial=options.partial)
    print(f"{freed / 1e6:.1f} MB freed")


def _verify(root: Path) -> None:
    """Read everything, delete what is damaged, and end with status 1 if anything was."""
    import shutil
    import sys

    from lpcam.storage.store import verify

    found = verify(root)
    damaged = {folder: lines for folder, lines in found.items() if lines}
    for folder, lines in damaged.items():
        print("\n".join(lines), file=sys.stderr)
        shutil.rmtree(folder)
    print(f"{len(found)} results read, {len(damaged)} damaged and deleted: a run makes them again")
    if damaged:
        sys.exit(1)


def _print_results(root: Path, stage: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lpcam.storage.store import results

    table = Table("stage", "key", "made from")
    for heading in ("MB", "days"):
        table.add_column(heading, justify="right")
    shown = results(root, stage or "*")
    for result in shown:
        inputs = ", ".join(f"{key}={value}" for key, value in result["inputs"].items())
        table.add_row(
            result["stage"],
            result["folder"].name,
            escape(inputs if len(inputs) < 200 else f"{inputs[:197]}..."),
            f"{result['bytes'] / 1e6:.1f}",
            f"{result['age']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"{len(shown)} results, {sum(r['bytes'] for r in shown) / 1e6:.1f} MB")
