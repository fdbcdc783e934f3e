"""All jobs of a sweep as a table, for a spreadsheet and for the page."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from lpcam.sweeps.findings import METRICS, Sweep
from lpcam.sweeps.jobs import DONE, Job, brief


def to_csv(sweep: Sweep) -> str:
    """A line a job: folder, status, its place on every axis, every metric, seconds in all."""
    metrics: dict[str, None] = {}
    for job in sweep.jobs:
        metrics |= dict.fromkeys(job.metrics)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["folder", "status", *(axis.key for axis in sweep.axes), *metrics, "seconds"])
    for job in sweep.jobs:
        places = [job.value(axis) for axis in sweep.axes]
        numbers = [job.metrics.get(name, "") for name in metrics]
        seconds = job.seconds.get("total", "")
        writer.writerow([job.folder.name, job.status, *places, *numbers, seconds])
    return buffer.getvalue()


@dataclass(frozen=True)
class JobCell:
    """What a cell shows, the number it is sorted by, and whether it is the best of its column."""

    text: str
    order: float
    best: bool = False


def job_table(sweep: Sweep) -> tuple[list[str], list[tuple[Job, list[JobCell]]]]:
    """The page's table.

    Returns:
        Headings, and the cells of each job, those with the highest mIoU first.
    """
    split = sweep.split
    # Heading, whether more (1) or less (-1) is better, format, value.
    columns: list[tuple[str, int, str, Callable[[Job], float]]] = []
    for name, (title, factor, form) in METRICS.items():
        columns.append((title, 1, form, _metric(split, name, factor)))
    gain: Callable[[Job], float] = lambda job: (  # noqa: E731
        100 * (job.score(split, "miou") - job.baseline(split))
    )
    columns.insert(1, ("against CAM (points)", 1, "{:+.1f}", gain))
    for name in sweep.mask_splits:
        columns.append((f"masks of {name} (%)", 1, "{:.1f}", _masks(name)))
    if sweep.mask_splits:
        columns.append(("of full supervision (%)", 1, "{:.1f}", lambda job: 100 * sweep.share(job)))
    columns.append(("best threshold", 0, "{:.2f}", _metric(split, "best_threshold", 1)))
    columns.append(("seconds", -1, "{:,.1f}", lambda job: job.seconds.get("total", math.nan)))
    jobs = sorted(sweep.jobs, key=lambda job: _last(-job.score(split, "miou")))
    rows: list[list[JobCell]] = [
        [JobCell(brief(job.value(axis)), axis.values.index(job.value(axis))) for axis in sweep.axes]
        for job in jobs
    ]
    for _, better, form, value in columns:
        values = [value(job) for job in jobs]
        known = [better * v for v in values if not math.isnan(v)]
        best = max(known, default=math.nan)
        for row, v in zip(rows, values, strict=True):
            text = "" if math.isnan(v) else form.format(v)
            row.append(JobCell(text, v, better != 0 and better * v == best))
    headings = [axis.key for axis in sweep.axes] + [title for title, *_ in columns]
    return headings, list(zip(jobs, rows, strict=True))


def _metric(split: str, name: str, factor: float) -> Callable[[Job], float]:
    return lambda job: factor * job.score(split, name)


def _masks(split: str) -> Callable[[Job], float]:
    return lambda job: 100 * job.metrics.get(f"{split}/masks/miou", math.nan)


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def computed(job: Job) -> str:
    """Which stages a job computed itself, with their seconds; the others lay in the store."""
    stages = {name: s for name, s in job.seconds.items() if name != "total" and s > 0}
    if job.status != DONE:
        return ""
    return ", ".join(f"{name} {s:,.1f}" for name, s in stages.items()) or "nothing"
