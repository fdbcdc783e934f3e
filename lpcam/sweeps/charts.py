"""Which plots a sweep gets: they are chosen from its axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lpcam.sweeps.figures import (
    MOST_LINES,
    Panel,
    bar_panel,
    heat_cells,
    heat_panel,
    legend_of,
    line_panel,
    scatter_panel,
)
from lpcam.sweeps.findings import METRICS, Sweep, effects
from lpcam.sweeps.jobs import Axis, group

T = TypeVar("T")

MOST_PANELS = 8


@dataclass(frozen=True)
class Chart:
    """Plots that belong together.

    Attributes:
        name: Name of the file with all of them.
        heading: What they show.
        note: How to read them.
        panels: The plots.
        legend: Names and their colours.
    """

    name: str
    heading: str
    note: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, str]] = ()


def charts(sweep: Sweep) -> list[Chart]:
    """Lines or, for a random search, dots along numbers; heat maps of pairs; bars for names."""
    axes = _varied(sweep)
    numeric = [axis for axis in axes if axis.numeric]
    named = named_axes(sweep)
    if not sweep.is_grid:
        found = [_dots(sweep, numeric)] if numeric else []
    else:
        found = [_lines(sweep, axes, numeric)] if numeric else []
        crowded = len(axes) == 2 and min(len(axis.values) for axis in axes) > MOST_LINES
        if len(numeric) > 1 or len(axes) > 2 or crowded:
            found += _heat_maps(sweep)
    return [*found, _bars(sweep, named)] if named else found


def named_axes(sweep: Sweep) -> list[Axis]:
    """The axis of names that gets a row of bars for each value, and one that gets the colours.

    A refiner and its source come first. Where only seeds differ, they are the names.
    """
    named = [axis for axis in _varied(sweep) if not axis.numeric]
    first = ("refiner", "refiner.source")
    place = {key: rank for rank, key in enumerate(first)}
    named.sort(key=lambda axis: (place.get(axis.key, len(first)), -len(axis.values)))
    return named[:1] + [axis for axis in named[1:] if len(axis.values) <= MOST_LINES][:1]


def _varied(sweep: Sweep) -> list[Axis]:
    """The axes along which scored jobs differ."""
    return [
        axis
        for axis in sweep.factors or sweep.axes
        if len({job.value(axis) for job in sweep.scored}) > 1
    ]


def _over(others: Sequence[Axis]) -> str:
    return f" over {', '.join(axis.key for axis in others)}" if others else ""


def _lines(sweep: Sweep, axes: Sequence[Axis], numeric: Sequence[Axis]) -> Chart:
    others = [axis for axis in axes if axis != numeric[0]]
    by = None
    if len(axes) == 2 and len(numeric) == 1 and len(others[0].values) <= MOST_LINES:
        by = others[0]
    metrics = sweep.metrics if len(numeric) == 1 else ["miou"]
    panels = [line_panel(sweep, axis, by, metric) for axis in numeric for metric in metrics]
    note = "Means, and a band from the lowest to the highest job at each value."
    heading = f"Along {', '.join(axis.key for axis in numeric)}"
    return Chart("lines", heading, note, panels, legend_of(by))


def _dots(sweep: Sweep, numeric: Sequence[Axis]) -> Chart:
    panels = [scatter_panel(sweep, axis) for axis in numeric]
    return Chart(
        "dots",
        "Every job",
        "The values form no grid: a dot is a job, the ring the best.",
        panels,
        legend_of(None),
    )


def _heat_maps(sweep: Sweep) -> list[Chart]:
    """MIoU over the three axes that matter most, and the other metrics over two of them."""
    chosen = [effect.axis for effect in effects(sweep)][:3]
    chosen.sort(key=lambda axis: (not axis.numeric, -len(axis.values)))
    if len(chosen) < 2:
        return []
    x, y, *third = chosen
    others = [axis for axis in sweep.axes if axis not in chosen]
    slices = [(sweep.scored, "mIoU")]
    if third:
        places = group(sweep.scored, third)
        known = [value for value in third[0].values if (value,) in places]
        slices = [
            (places[value,], f"mIoU, {third[0].name}={value}")
            for value in evenly(known, MOST_PANELS)
        ]
    grids = [heat_cells(sweep, jobs, x, y, "miou") for jobs, _ in slices]
    limits = float(np.nanmin(grids)), float(np.nanmax(grids))
    panels = [
        heat_panel(cells, x, y, "miou", title, limits)
        for cells, (_, title) in zip(grids, slices, strict=True)
    ]
    heading = f"mIoU over {', '.join(axis.key for axis in chosen)}"
    note = f"mIoU (%){', mean' if others else ''}{_over(others)}; the best of each map is framed."
    found = [Chart("heat_maps", heading, note, panels)]
    panels = []
    for metric in sweep.metrics[1:]:
        cells = heat_cells(sweep, sweep.scored, x, y, metric)
        limits = float(np.nanmin(cells)), float(np.nanmax(cells))
        panels.append(heat_panel(cells, x, y, metric, METRICS[metric][0], limits))
    if panels:
        averaged = [*third, *others]
        note = f"Means{_over(averaged)}." if averaged else "One job each."
        found.append(Chart("other_metrics", "At the same settings: other metrics", note, panels))
    return found


def _bars(sweep: Sweep, named: Sequence[Axis]) -> Chart:
    others = [axis for axis in sweep.axes if axis not in named]
    note = "One job each"
    if others:
        note = f"Means{_over(others)}; a thin line goes from the lowest to the highest job"
    by = named[1] if len(named) > 1 else None
    panels = [bar_panel(sweep, named[0], by, metric) for metric in sweep.metrics]
    heading = f"By {' and '.join(axis.key for axis in named)}"
    return Chart("bars", heading, f"{note}.", panels, legend_of(by))


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most so many items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    step = (len(items) - 1) / max(1, count - 1)
    return [items[round(i * step)] for i in range(count)]
