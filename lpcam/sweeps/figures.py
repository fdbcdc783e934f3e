"""The plots of a sweep: lines, heat maps and bars, each a panel that can stand alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from lpcam.reporting.figures import COLOURS, INK, new_figure, styled
from lpcam.sweeps.findings import METRICS, Sweep, average, comparable
from lpcam.sweeps.jobs import Axis, Job, group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = len(COLOURS) - 1  # the first colour is the baseline's
MOST_TICKS = 14
SCALE = "viridis"  # perceptually uniform, readable on white and on black
LOG_RATIO = 50  # from here on numbers stand on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Its heading, which also says what it shows to who cannot see it.
        size: Width and height in inches.
        draw: Draws it.
    """

    title: str
    size: tuple[float, float]
    draw: Callable[["Axes"], None]


@styled
def draw_panels(panels: Sequence[Panel], *, legend: bool = True) -> "Figure":
    """Panels side by side, at most three a row.

    Args:
        panels: The panels.
        legend: Put the legend of the first one above all.
    """
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = (max(panel.size[i] for panel in panels) for i in (0, 1))
    figure = new_figure(columns * width, rows * height)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=11, loc="left")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, names = grid[0, 0].get_legend_handles_labels()
    if handles and legend:
        fitting = int(columns * width * 11 / (max(map(len, names)) + 5))
        options: Any = {"ncols": max(1, fitting), "columnspacing": 1.2, "handlelength": 1.4}
        figure.legend(handles, names, loc="outside upper left", fontsize=9, **options)
    return figure


def legend_of(by: Axis | None) -> list[tuple[str, str]]:
    """Names and colours of what lines and bars show: CAM, and the values of an axis."""
    names = [f"{by.name}={text}" for text in shorten(by.values)] if by else []
    return [*zip(names, COLOURS[1:], strict=False), ("CAM", COLOURS[0])]


def shorten(texts: Sequence[str], limit: int = 24) -> list[str]:
    """Cut the middle out of long texts, unless that makes two of them equal."""
    half = limit // 2 - 1
    cut = [text if len(text) <= limit else f"{text[:half]}…{text[-half:]}" for text in texts]
    return cut if len(set(cut)) == len(set(texts)) else list(texts)


def line_panel(sweep: Sweep, axis: Axis, by: Axis | None, metric: str) -> Panel:
    """A metric along a numeric axis: means, and a band from the lowest to the highest job.

    Args:
        sweep: The sweep.
        axis: The numeric axis.
        by: An axis with a line for each value, if any.
        metric: Which metric; to mIoU belongs CAM's as a reference.
    """

    def draw(axes: "Axes") -> None:
        jobs = comparable(sweep, axis) if by is None else sweep.scored
        lines = group(jobs, [by] if by else [])
        names = dict(zip(by.values, shorten(by.values), strict=True)) if by else {}
        for key in sorted(lines, key=lambda key: by.values.index(key[0]) if by else 0):
            colour = COLOURS[1 + list(names).index(key[0])] if by else COLOURS[1]
            name = f"{by.name}={names[key[0]]}" if by else None
            _line(axes, sweep, lines[key], axis, metric, colour, name)
        if metric == "miou":
            places, means = _along(axis, jobs, lambda found: [sweep.baseline(found)])
            if not np.isnan(means).all():
                axes.plot(places, 100 * means[:, 0], "--", color=COLOURS[0], label="CAM")
        axes.set(xlabel=axis.key, ylabel=METRICS[metric][0])
        axes.margins(x=0.08, y=0.15)  # for the number above the best
        _scale(axes, axis)
        _tick(axes, [text for text in axis.values if (text,) in group(jobs, [axis])])
        axes.grid(linewidth=0.6)

    return Panel(f"{METRICS[metric][0].removesuffix(' (%)')} along {axis.name}", (3.95, 3.1), draw)


def _line(
    axes: "Axes",
    sweep: Sweep,
    jobs: Sequence[Job],
    axis: Axis,
    metric: str,
    colour: str,
    name: str | None,
) -> None:
    _, factor, form = METRICS[metric]

    def spread(jobs: Sequence[Job]) -> list[float]:
        scores = [job.score(sweep.split, metric) for job in jobs]
        known = [score for score in scores if not math.isnan(score)] or [math.nan]
        return [factor * min(known), factor * average(known), factor * max(known)]

    places, (low, mean, high) = _unzip(_along(axis, jobs, spread))
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(places, mean, "-o", color=colour, linewidth=2, markersize=4, label=name)
    if name is None and not np.isnan(mean).all():
        best = int(np.nanargmax(mean))
        where: Any = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        axes.annotate(form.format(mean[best]), (places[best], mean[best]), fontsize=9, **where)


def _along(
    axis: Axis, jobs: Sequence[Job], measure: Callable[[Sequence[Job]], list[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of an axis where there are jobs ``(n,)``, and their measures ``(n, m)``."""
    places = group(jobs, [axis])
    known = [text for text in axis.values if (text,) in places]
    numbers = np.array([float(text) for text in known])
    return numbers, np.array([measure(places[text,]) for text in known])


def _unzip(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pair[0], pair[1].T


def _scale(axes: "Axes", axis: Axis) -> None:
    first, last = axis.numbers[[0, -1]]
    if first > 0 and last / first >= LOG_RATIO:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")


def _tick(axes: "Axes", values: Sequence[str]) -> None:
    """Tick the values themselves where they leave room for their texts."""
    numbers = [float(text) for text in values]
    spread = np.log(numbers) if axes.get_xscale() == "log" else numbers
    room = 0.017 * (2 + max(map(len, values))) * (spread[-1] - spread[0])
    chosen: list[int] = []
    for i in range(len(numbers)):
        if not chosen or spread[i] - spread[chosen[-1]] >= room:
            chosen.append(i)
    axes.set_xticks([numbers[i] for i in chosen], [values[i] for i in chosen])


def scatter_panel(sweep: Sweep, axis: Axis) -> Panel:
    """MIoU of every job along a numeric axis, for sweeps whose values make no grid."""

    def draw(axes: "Axes") -> None:
        numbers = np.array([float(job.value(axis)) for job in sweep.scored])
        scores = np.array([100 * job.score(sweep.split, "miou") for job in sweep.scored])
        axes.plot(numbers, scores, "o", color=COLOURS[1], markersize=5, label="a job")
        best = int(scores.argmax())
        ring: Any = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot(numbers[best], scores[best], "o", color=COLOURS[2], label="the best", **ring)
        if not math.isnan(cam := 100 * sweep.baseline(sweep.scored)):
            axes.axhline(cam, linestyle="--", color=COLOURS[0], label="CAM")
        axes.set(xlabel=axis.key, ylabel=METRICS["miou"][0])
        _scale(axes, axis)
        axes.grid(linewidth=0.6)

    return Panel(f"mIoU against {axis.name}", (3.95, 3.1), draw)


def heat_cells(sweep: Sweep, jobs: Sequence[Job], x: Axis, y: Axis, metric: str) -> np.ndarray:
    """Mean of a metric over the jobs at each place ``(rows of y, columns of x)``, NaN if none."""
    places = group(jobs, [y, x])
    cells = [sweep.mean(places.get(place, ()), metric) for place in product(y.values, x.values)]
    return np.reshape(cells, (len(y.values), len(x.values)))


def heat_panel(
    cells: np.ndarray, x: Axis, y: Axis, metric: str, title: str, limits: tuple[float, float]
) -> Panel:
    """A metric over two axes, with its values in the cells and the best of the panel framed.

    Args:
        cells: From :func:`heat_cells`.
        x: The axis from left to right.
        y: The axis from top to bottom.
        metric: Which metric.
        title: The panel's heading.
        limits: The lowest and the highest value, where the colours end.
    """
    left = max(map(len, shorten(y.values)))

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        _, factor, form = METRICS[metric]
        scale, (low, high) = colormaps[SCALE], limits
        best = np.nanmax(cells) if not np.isnan(cells).all() else math.nan
        for (row, column), value in np.ndenumerate(cells):
            middle = (column, row)
            if math.isnan(value):
                axes.text(*middle, "n/a", ha="center", va="center")
                continue
            colour = scale((value - low) / (high - low) if high > low else 0.5)
            frame = INK if value == best else "none"
            corner = (column - 0.47, row - 0.46)
            axes.add_patch(
                Rectangle(corner, 0.94, 0.92, facecolor=colour, edgecolor=frame, linewidth=2)
            )
            # Not the ink of the other texts, which turns light on a dark page; cells do not.
            ink = "#ffffff" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.4 else "#000000"
            weight = "bold" if value == best else "normal"
            text = form.format(factor * value)
            axes.text(*middle, text, ha="center", va="center", color=ink, weight=weight)
        names = shorten(x.values)
        slant: Any = {"rotation": 35, "ha": "right"} if max(map(len, names)) > 6 else {}
        axes.set_xticks(range(len(names)), names, **slant)
        axes.set_yticks(range(len(y.values)), shorten(y.values))
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(y.values) - 0.5, -0.5))
        axes.set(xlabel=x.key, ylabel=y.key)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    width = max(0.7 + 0.08 * left + 0.6 * len(x.values), 0.085 * len(title) + 0.3, 2.8)
    return Panel(title, (width, max(1.0 + 0.42 * len(y.values), 2.2)), draw)


def bar_panel(sweep: Sweep, axis: Axis, by: Axis | None, metric: str) -> Panel:
    """A metric at each value of an axis: mean as a bar, lowest and highest job as a whisker.

    Args:
        sweep: The sweep.
        axis: The axis with a row for each value.
        by: An axis with a bar for each value in every row, if any.
        metric: Which metric; to mIoU belongs CAM's as a reference.
    """
    hues = by.values if by else ("",)
    thickness = 0.84 / len(hues)

    def draw(axes: "Axes") -> None:
        _, factor, form = METRICS[metric]
        places = group(sweep.scored, [axis, by] if by else [axis])
        names = shorten(hues)
        top = 0.0
        for h, hue in enumerate(hues):
            key = (hue,) if by else ()
            offset = (h - (len(hues) - 1) / 2) * thickness
            axes.barh(0, 0, color=COLOURS[1 + h], label=f"{by.name}={names[h]}" if by else None)
            for row, value in enumerate(axis.values):
                scores = [
                    factor * score
                    for job in places.get((value, *key), ())
                    if not math.isnan(score := job.score(sweep.split, metric))
                ]
                if not scores:
                    continue
                mean, place = float(np.mean(scores)), row + offset
                axes.barh(place, mean, 0.92 * thickness, color=COLOURS[1 + h])
                if len(scores) > 1:
                    axes.plot([min(scores), max(scores)], [place] * 2, color=INK, linewidth=1.2)
                top = max(top, *scores)
                axes.annotate(
                    form.format(mean),
                    (max(scores), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
        if metric == "miou" and not math.isnan(cam := 100 * sweep.baseline(sweep.scored)):
            axes.axvline(cam, linestyle="--", color=COLOURS[0], label="CAM")
            top = max(top, cam)
        axes.set_yticks(range(len(axis.values)), shorten(axis.values))
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1.16 * top or 1), ylim=(len(axis.values) - 0.5, -0.5))
        axes.set(xlabel=METRICS[metric][0], ylabel=axis.key)
        axes.grid(axis="x", linewidth=0.6)

    title = f"{METRICS[metric][0].removesuffix(' (%)')} by {axis.name}"
    return Panel(title, (4.6, 1.2 + len(axis.values) * (0.22 * len(hues) + 0.12)), draw)
