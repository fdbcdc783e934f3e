"""What was measured as a page and a picture, from the JSON files of all tables."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.benchmarks.harness import UNSTEADY, Row

# key of a row: (heading, factor, format)
COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "min": ("least, ms", 1e3, ".4g"),
    "median": ("median, ms", 1e3, ".4g"),
    "iqr": ("IQR, ms", 1e3, ".2g"),
    "overhead": ("beyond the control, ms", 1e3, ".3g"),
    "ratio": ("relative to it", 1, ".3f"),
    "rounds": ("rounds", 1, "d"),
    "seconds": ("seconds", 1, ".3g"),
    "iterations": ("iterations", 1, "d"),
    "iteration": ("an iteration, ms", 1e3, ".3g"),
    "objective": ("objective", 1, ".6g"),
    "memory": ("further memory, MB", 1, ".0f"),
    "resident": ("resident at most, MB", 1, ".0f"),
    "forwards": ("forward passes", 1, "d"),
    "backwards": ("backward passes", 1, "d"),
    "gflop": ("GFLOP", 1, ".4g"),
    "pictures": ("pictures", 1, "d"),
    "rate": ("pictures a second", 1, ".3g"),
    "bytes": ("bytes a map", 1, ".0f"),
}
TITLE_OF_VALUE = {
    "median": "seconds", "seconds": "seconds", "bytes": "bytes a map", "resident": "MB",
}  # fmt: skip
FAR_APART = 20  # from this ratio on the picture's axis is logarithmic
ROWS_OF_COLUMN = 40


def write(folder: Path) -> None:
    """Write ``results.md`` and ``results.png`` beside the folder ``results`` of the JSON files."""
    tables = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    (folder / "results.md").write_text(page(tables))
    picture([part for table in tables for part in table["sections"]]).savefig(
        folder / "results.png", dpi=80
    )


def page(tables: Sequence[Mapping[str, Any]]) -> str:
    """Every table with its targets, and the machine that it is from."""
    lines = ["# Benchmarks", "", "`make bench`, or `python -m experiments.benchmarks NAME ...`", ""]
    for table in tables:
        lines += [f"## {table['table']}", "", machine_line(table), ""]
        for part in table["sections"]:
            lines += [*section_lines(part), ""]
    lines += ["![Medians of all tables](results.png)", ""]
    return "\n".join(lines)


def machine_line(table: Mapping[str, Any]) -> str:
    """One line that says what a table was measured on and with."""
    of = table["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in of["versions"].items())
    quick = " **Tiny sizes: these numbers say nothing.**" if table["quick"] else ""
    return (
        f"{of['device']}, {of['cores']} cores, {of['threads']} threads, {of['system']}; "
        f"{versions}; "
        f"commit {of['commit']}; {table['seconds']:.0f} s in all.{quick}"
    )


def section_lines(part: Row) -> list[str]:
    """One table in Markdown."""
    keys = [key for key in COLUMNS if any(key in row for row in part["rows"])]
    lines = [f"### {part['title']}", "", part["text"], ""]
    if not part["valid"]:
        lines += [
            f"**Invalid: the control's interquartile range is {part['control_spread']:.0%} of its "
            f"median, more than {UNSTEADY:.0%}; measure again on an idle machine.**",
            "",
        ]
    lines.append("| | " + " | ".join(COLUMNS[key][0] for key in keys) + " |")
    lines.append("|" + "---|" * (len(keys) + 1))
    for row in part["rows"]:
        cells = [_cell(row.get(key), *COLUMNS[key][1:]) for key in keys]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    if part["targets"]:
        lines.append("")
    for aim in part["targets"]:
        reached = "reached" if aim["reached"] else "**not reached**"
        lines.append(f"* {aim['text']}: {aim['measured']:.4g}, aim {aim['bound']}: {reached}")
    return lines


def _cell(value: float | None, factor: float, form: str) -> str:
    return "" if value is None else format(value if form == "d" else value * factor, form)


def picture(sections: Sequence[Row]) -> Figure:
    """Horizontal bars of every section, one below the other in as many columns as it takes."""
    heights = [len(part["rows"]) + 3 for part in sections]
    columns: list[list[int]] = [[]]
    for index, height in enumerate(heights):
        if columns[-1] and sum(heights[i] for i in columns[-1]) + height > ROWS_OF_COLUMN:
            columns.append([])
        columns[-1].append(index)
    figure = Figure(figsize=(8 * len(columns), 0.27 * ROWS_OF_COLUMN + 1), layout="constrained")
    for place, column in enumerate(figure.subfigures(1, len(columns), squeeze=False)[0]):
        inside = columns[place]
        parts = [heights[i] for i in inside]
        # What is left of a column stays empty.
        parts.append(max(ROWS_OF_COLUMN - sum(parts), 1))
        axes = column.subplots(len(parts), squeeze=False, height_ratios=parts)[:, 0]
        axes[-1].set_axis_off()
        for axis, index in zip(axes[:-1], inside, strict=True):
            draw(axis, sections[index])
    return figure


def draw(axis: Any, part: Row) -> None:
    """Bars of one section."""
    names = [textwrap.fill(row["name"], 34) for row in part["rows"]]
    values = [row[part["value"]] for row in part["rows"]]
    axis.barh(names, values, color="#4878a8" if part["valid"] else "#c0c0c0")
    axis.invert_yaxis()
    if min(values) > 0 and max(values) / min(values) > FAR_APART:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(10 ** math.floor(math.log10(min(values))), 3 * max(values))
    for place, value in enumerate(values):
        axis.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)
    axis.margins(x=0.12)
    axis.tick_params(labelsize=7)
    axis.set_xlabel(TITLE_OF_VALUE[part["value"]], fontsize=7)
    axis.set_title(part["title"] + ("" if part["valid"] else " (invalid)"), fontsize=8, loc="left")
