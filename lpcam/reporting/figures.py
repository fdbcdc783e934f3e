"""The figures of a report: drawn once, saved as PNG files and put into the page as SVG."""

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from lpcam.reporting.mistakes import confusion_shares
from lpcam.reporting.scores import Method
from lpcam.storage.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a method, told apart by the colour-blind and readable on white and on black.
COLOURS = ("#8a8f98", "#2f81dd", "#e08a1e", "#27a27c", "#c45ab3")
INK = "#22262c"
LOSS = "#d64550"
LABELLED = 16  # labels up to which a confusion has its numbers
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#8888884d",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lpcam",  # the same figure gives the same bytes
}


P = ParamSpec("P")


def styled(draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    """Draw in the report's style without touching that of the process."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, width and height in inches, that makes room for all its labels."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG file on white."""
    buffer = io.BytesIO()
    _write(figure, buffer, "png", dpi=120, facecolor="white")
    write_atomically(path, buffer.getvalue())


def svg(figure: "Figure") -> str:
    """A figure as an ``<svg>`` element to stand in HTML, its ink in the text's colour."""
    buffer = io.BytesIO()
    _write(figure, buffer, "svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace(INK, "currentColor")


def _write(figure: "Figure", buffer: io.BytesIO, kind: str, **options: Any) -> None:
    import matplotlib.text

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A class name may be in a script that the figure's font lacks; the browser's has it.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        for text in figure.findobj(matplotlib.text.Text):
            text.set_parse_math(False)  # names are no formulas, whatever they hold
        figure.savefig(buffer, format=kind, **options)


@styled
def draw_curves(methods: Sequence[Method], splits: Sequence[str], threshold: float) -> "Figure":
    """MIoU against the background threshold, a panel a split, each method's best marked.

    Args:
        methods: The methods; each has scores for the splits.
        splits: Which splits.
        threshold: The configured threshold, drawn as a thin line.
    """
    figure = new_figure(4.4 * len(splits), 3.4)
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        axes.axvline(threshold, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        top = 0.0
        for method, colour in zip(methods, COLOURS, strict=False):
            result = method.results[split]
            axes.plot(
                result.thresholds,
                100 * result.miou,
                "-o",
                color=colour,
                linewidth=2,
                markevery=[result.best],
                label=method.name,
            )
            top = max(top, float(result.miou[result.best]))
        axes.set(xlim=(0, 1), ylim=(0, max(108 * top, 1)), title=split)
        axes.set(xlabel="background threshold", ylabel="mIoU (%)")
        axes.grid(linewidth=0.6)
    _legend(figure)
    return figure


@styled
def draw_classes(
    methods: Sequence[Method], splits: Sequence[str], classes: Sequence[str]
) -> "Figure":
    """IoU of each class at each method's best threshold, the largest gain on top.

    Args:
        methods: The methods, the baseline first, then the one compared with it.
        splits: A panel for each.
        classes: Names of the C classes.
    """
    figure = new_figure(4.4 * len(splits), 1.1 + len(classes) * (0.11 * len(methods) + 0.09))
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        _class_bars(axes, methods, split, classes)
    _legend(figure)
    return figure


@styled
def draw_confusion(methods: Sequence[Method], split: str, classes: Sequence[str]) -> "Figure":
    """Which label the pixels of each label get at the best threshold, a panel a method.

    Args:
        methods: The methods.
        split: Which split.
        classes: Names of the C classes; those that no picture of the split shows are left out.
    """
    shares = [100 * confusion_shares(method.results[split]) for method in methods]
    kept = np.flatnonzero(~np.isnan(shares[0][:, 0]))
    names = [("background", *classes)[label] for label in kept]
    side = max(1.6 + 0.42 * len(kept), 3.4) if len(kept) <= LABELLED else 7.0
    figure = new_figure(side * len(methods), side + 0.4)
    for axes, method, share in zip(
        figure.subplots(1, len(methods), squeeze=False)[0], methods, shares, strict=True
    ):
        values = share[np.ix_(kept, kept)]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
        size = 9 if len(kept) <= LABELLED else 4
        axes.set_xticks(range(len(kept)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(kept)), names, fontsize=size)
        axes.set(title=f"{method.name}, {split}", xlabel="predicted (% of the true label's pixels)")
        axes.set_ylabel("true")
        if len(kept) <= LABELLED:
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if value > 60 else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour
                )
    return figure


def _legend(figure: "Figure") -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    options: Any = {"ncols": len(labels), "columnspacing": 1.2, "handlelength": 1.2}
    figure.legend(handles, labels, loc="outside upper left", fontsize=9, **options)


def _class_bars(
    axes: "Axes", methods: Sequence[Method], split: str, classes: Sequence[str]
) -> None:
    results = [method.results[split] for method in methods]
    ious = [100 * result.iou[result.best, 1:] for result in results]
    gain = ious[1] - ious[0]
    order = np.argsort(-np.nan_to_num(gain, nan=-np.inf), kind="stable")
    place = np.arange(len(classes))
    thickness = 0.8 / len(methods)
    for i, (method, iou, colour) in enumerate(zip(methods, ious, COLOURS, strict=False)):
        offset = (i - (len(methods) - 1) / 2) * thickness
        axes.barh(
            place + offset, np.nan_to_num(iou[order]), thickness, color=colour, label=method.name
        )
    for row, c in enumerate(order):
        if not np.isnan(gain[c]):
            end = max(np.nan_to_num(iou[c]) for iou in ious)
            colour = LOSS if gain[c] < 0 else INK
            axes.text(end + 1.5, row, f"{gain[c]:+.1f}", va="center", fontsize=9, color=colour)
    axes.set_yticks(place, [classes[c] for c in order])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 116), ylim=(len(classes) - 0.4, -0.6), title=split)
    axes.set(xlabel=f"IoU (%), and the gain of {methods[1].name} over {methods[0].name}")
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", linewidth=0.6)
