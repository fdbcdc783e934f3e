"""The scores of several methods, as a table and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lpcam.data.dataset import Picture
from lpcam.evaluation.segmentation import SegmentationResult
from lpcam.seeds import Seed, load_seed

# Heading, and whether more (1) or less (-1) of it is better.
COLUMNS = {
    "miou": ("mIoU", 1),
    "gain": ("gain", 0),
    "best_threshold": ("at threshold", 0),
    "miou_at_threshold": ("mIoU at {:.2f}", 1),
    "precision": ("precision", 1),
    "recall": ("recall", 1),
    "fp": ("FP", -1),
    "fn": ("FN", -1),
    "threshold_width": ("width", 1),
}
FORMATS = {"gain": "{:+.1f}", "best_threshold": "{:.2f}", "threshold_width": "{:.2f}"}


@dataclass(frozen=True)
class Method:
    """One way of making maps, and how its maps score.

    Attributes:
        name: As shown: ``CAM``, ``LPCAM``, ...
        results: Scores by split; a split without masks is left out.
        maps: By split, the folder of its seed records ``<id>.npz``.
    """

    name: str
    results: Mapping[str, SegmentationResult]
    maps: Mapping[str, Path]

    def threshold(self, split: str, otherwise: float) -> float:
        """The split's best background threshold, or another where the split has no scores."""
        result = self.results.get(split)
        return float(result.thresholds[result.best]) if result else otherwise

    def seed(self, split: str, picture: Picture) -> Seed:
        """The maps of a picture."""
        return load_seed(self.maps[split] / f"{picture.id}.npz")


@dataclass(frozen=True)
class Cell:
    """A number of the table as text, and whether it is the best of its column."""

    text: str
    best: bool


def score_rows(methods: Sequence[Method], split: str, threshold: float) -> list[list[Cell]]:
    """The table of a split, a row a method, in the order of ``COLUMNS``.

    Percent and points with one decimal; thresholds and the width of their range with two.

    Args:
        methods: The baseline first; each has scores for the split.
        split: Which split.
        threshold: The configured background score.
    """
    table: list[dict[str, float]] = []
    for method in methods:
        result = method.results[split]
        metrics = result.metrics([""] * (result.iou.shape[1] - 1), threshold)
        if table:
            metrics["gain"] = metrics["miou"] - table[0]["miou"]
        table.append(metrics)
    rows: list[list[Cell]] = [[] for _ in methods]
    for key, (_, better) in COLUMNS.items():
        texts = [_text(key, metrics.get(key, math.nan)) for metrics in table]
        ranked = [(better * m[key], text) for m, text in zip(table, texts, strict=True) if key in m]
        best = max(ranked)[1] if better and ranked else None
        for row, text in zip(rows, texts, strict=True):
            row.append(Cell(text, text == best))
    return rows


def _text(key: str, value: float) -> str:
    scale = 1 if key in ("best_threshold", "threshold_width") else 100
    return "n/a" if math.isnan(value) else FORMATS.get(key, "{:.1f}").format(scale * value)


def in_words(
    methods: Sequence[Method], split: str, classes: Sequence[str], threshold: float
) -> tuple[str, str]:
    """What happened, computed from the numbers: overall, and over the classes.

    Args:
        methods: The baseline, then the method compared with it; both have scores for the split.
        split: Which split.
        classes: Names of the C classes.
        threshold: The configured background score.

    Returns:
        Two sentences.
    """
    baseline, compared = methods
    before, after = (m.results[split].metrics(classes, threshold) for m in methods)
    gain = 100 * (after["miou"] - before["miou"])
    if round(gain, 1) > 0:
        what = f"gains {gain:.1f} points of mIoU over {baseline.name}"
    elif round(gain, 1) < 0:
        what = f"loses {-gain:.1f} points of mIoU against {baseline.name}"
    else:
        what = f"and {baseline.name} have the same mIoU"
    parts = [
        f"{name} {100 * before[name]:.0f} → {100 * after[name]:.0f}"
        for name in ("recall", "precision")
        if name in before and name in after
    ]
    overall = (
        f"On {split}, {compared.name} {what} "
        f"({100 * before['miou']:.1f} → {100 * after['miou']:.1f})"
        f"{': ' if parts else ''}{', '.join(parts)}."
    )
    gains = {
        name: 100 * (after[f"iou/{name}"] - before[f"iou/{name}"])
        for name in classes
        if f"iou/{name}" in before and f"iou/{name}" in after
    }
    if not gains:
        return overall, ""
    least, most = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    count = sum(gain > 0 for gain in gains.values())
    return overall, (
        f"{count} of {len(gains)} classes gain; most: {most} ({gains[most]:+.1f}), "
        f"least: {least} ({gains[least]:+.1f})."
    )


def print_table(
    scores: Mapping[str, Mapping[str, SegmentationResult]], titles: Mapping[str, str]
) -> None:
    """Print the scores to the terminal.

    Args:
        scores: Scores by method and split.
        titles: The names of the methods to show.
    """
    methods = [Method(titles[name], results, {}) for name, results in scores.items()]
    shown = [key for key in COLUMNS if key not in ("miou_at_threshold", "threshold_width")]
    console = Console()
    for split in dict.fromkeys(split for method in methods for split in method.results):
        scored = [method for method in methods if split in method.results]
        table = Table("", *(COLUMNS[key][0] for key in shown), title=split)
        for method, row in zip(scored, score_rows(scored, split, 0), strict=True):
            cells = [cell for key, cell in zip(COLUMNS, row, strict=True) if key in shown]
            styled = [f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in cells]
            table.add_row(method.name, *styled)
        console.print(table)
