"""The scores of several methods, as a table and in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from lpcam.data.dataset import Picture, open_image
from lpcam.evaluation.segmentation import SegmentationResult
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord, read_seed
from lpcam.storage.records import Records

AT_BEST = ("miou", "precision", "recall", "fp", "fn")
# Heading, whether more (1) or less (-1) is better, factor, format.
COLUMNS = {
    "miou": ("mIoU", 1, 100, "{:.1f}"),
    "gain": ("gain", 0, 100, "{:+.1f}"),
    "best_threshold": ("at threshold", 0, 1, "{:.2f}"),
    "miou_at_threshold": ("mIoU at {:.2f}", 1, 100, "{:.1f}"),
    "precision": ("precision", 1, 100, "{:.1f}"),
    "recall": ("recall", 1, 100, "{:.1f}"),
    "fp": ("FP", -1, 100, "{:.1f}"),
    "fn": ("FN", -1, 100, "{:.1f}"),
    "threshold_width": ("width", 1, 1, "{:.2f}"),
}


@dataclass(frozen=True)
class Method:
    """One way of making maps, and how its maps score.

    Attributes:
        name: As shown: ``CAM``, ``LPCAM``, ...
        results: Scores by split; a split without masks is left out.
        maps: Its seed records, by split.
    """

    name: str
    results: Mapping[str, SegmentationResult]
    maps: Mapping[str, Records]

    def threshold(self, split: str, otherwise: float) -> float:
        """The split's best background threshold, or another where the split has no scores."""
        result = self.results.get(split)
        return float(result.thresholds[result.best]) if result else otherwise

    def seed(self, split: str, picture: Picture) -> SeedRecord:
        """The maps of a picture."""
        return read_seed(self.maps[split], picture.id)

    def mask(self, split: str, picture: Picture, otherwise: float) -> np.ndarray:
        """The mask ``(H, W)`` of a picture at :meth:`threshold`."""
        seed = self.seed(split, picture)
        return seed_mask(seed.full_size(), seed.keys, self.threshold(split, otherwise))


class MaskMethod(Method):
    """A way of making masks; its records are masks ``<id>.png``, files all."""

    def mask(self, split: str, picture: Picture, otherwise: float) -> np.ndarray:
        """The mask ``(H, W)`` of a picture."""
        return np.asarray(open_image(self.maps[split].folder / f"{picture.id}.png"))


@dataclass(frozen=True)
class ScoreCell:
    """A number of the table as text, and whether it is the best of its column."""

    text: str
    best: bool


def score_rows(methods: Sequence[Method], split: str, threshold: float) -> list[list[ScoreCell]]:
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
        values = {name: getattr(result, name)[result.best] for name in AT_BEST}
        values |= {
            "gain": values["miou"] - table[0]["miou"] if table else math.nan,
            "best_threshold": result.thresholds[result.best],
            "miou_at_threshold": result.miou_at(threshold),
            "threshold_width": result.threshold_width,
        }
        table.append(values)
    rows: list[list[ScoreCell]] = [[] for _ in methods]
    for key, (_, better, scale, form) in COLUMNS.items():
        column = [values[key] for values in table]
        texts = ["n/a" if math.isnan(v) else form.format(scale * v) for v in column]
        known = [(better * v, text) for v, text in zip(column, texts, strict=True) if v == v]
        best = max(known)[1] if known else None
        for row, text in zip(rows, texts, strict=True):
            row.append(ScoreCell(text, better != 0 and text == best))
    return rows


def in_words(methods: Sequence[Method], split: str, classes: Sequence[str]) -> list[str]:
    """What happened, computed from the numbers: overall, and over the classes.

    Args:
        methods: The baseline, then the method compared with it; both have scores for the split.
        split: Which split.
        classes: Names of the C classes.

    Returns:
        Sentences.
    """
    baseline, compared = methods
    before, after = (method.results[split] for method in methods)
    i, j = before.best, after.best
    gain = 100 * (after.miou[j] - before.miou[i])
    if round(gain, 1) > 0:
        what = f"gains {gain:.1f} points of mIoU over {baseline.name}"
    elif round(gain, 1) < 0:
        what = f"loses {-gain:.1f} points of mIoU against {baseline.name}"
    else:
        what = f"has the same mIoU as {baseline.name}"
    sentence = (
        f"On {split}, {compared.name} {what} "
        f"({100 * before.miou[i]:.1f} → {100 * after.miou[j]:.1f})"
    )
    parts = []
    for name in ("recall", "precision"):
        old, new = 100 * getattr(before, name)[i], 100 * getattr(after, name)[j]
        if not math.isnan(old + new):  # a method that predicts no object has no precision
            parts.append(f"{name} {old:.0f} → {new:.0f}")
    sentences = [f"{sentence}: {', '.join(parts)}." if parts else f"{sentence}."]
    gains = 100 * (after.iou[j, 1:] - before.iou[i, 1:])
    if not np.isnan(gains).all():
        most, least = int(np.nanargmax(gains)), int(np.nanargmin(gains))
        sentences.append(
            f"{(gains > 0).sum()} of {(~np.isnan(gains)).sum()} classes gain; "
            f"most: {classes[most]} ({gains[most]:+.1f}), "
            f"least: {classes[least]} ({gains[least]:+.1f})."
        )
    return sentences


def print_table(
    scores: Mapping[str, Mapping[str, SegmentationResult]], titles: Mapping[str, str]
) -> None:
    """Print the scores to the terminal.

    Args:
        scores: Scores by method and split.
        titles: The names of the methods to show.
    """
    methods = [Method(titles[name], results, {}) for name, results in scores.items()]
    shown = ("miou", "gain", "best_threshold", "precision", "recall")  # fits 80 columns
    console = Console()
    for split in dict.fromkeys(split for method in methods for split in method.results):
        scored = [method for method in methods if split in method.results]
        rows = score_rows(scored, split, 0)
        keys = [
            key
            for key, *cells in zip(COLUMNS, *rows, strict=True)
            if key in shown and any(cell.text != "n/a" for cell in cells)
        ]
        table = Table("", *(COLUMNS[key][0] for key in keys), title=split)
        for method, row in zip(scored, rows, strict=True):
            cells = [cell for key, cell in zip(COLUMNS, row, strict=True) if key in keys]
            styled = [f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in cells]
            table.add_row(method.name, *styled)
        console.print(table)
