"""A sweep at a glance: ``lpcam summary FOLDER`` writes sweep.csv and sweep.html.

It works on a sweep that is still running or was stopped, from what its jobs have left.
"""

import base64
import hashlib
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lpcam.data.dataset import SegmentationDataset
from lpcam.data.files import file_names
from lpcam.errors import InputError
from lpcam.reporting.figures import save_png, svg
from lpcam.reporting.gallery import draw_gallery
from lpcam.reporting.page import class_colours, data_uri, render
from lpcam.reporting.shown import SAVED, choose_pictures
from lpcam.storage.files import write_atomically
from lpcam.sweeps.charts import charts, named_axes
from lpcam.sweeps.figures import draw_panels, shorten
from lpcam.sweeps.findings import (
    Sweep,
    average,
    best_in_words,
    class_ious,
    command_of,
    effects,
    label,
    no_help,
    noise,
)
from lpcam.sweeps.gallery import Row, choose_jobs, make_rows
from lpcam.sweeps.jobs import DONE, FAILED, MISSING, Job, brief, group, read_jobs
from lpcam.sweeps.table import computed, job_table, to_csv

STANDALONE_ROWS = 4
PRINTED = 10
MOST_CLASS_COLUMNS = 16


@dataclass(frozen=True)
class Summary:
    """What became of a sweep.

    Attributes:
        page: ``sweep.html``.
        sweep: The jobs and what they scored.
    """

    page: Path
    sweep: Sweep

    def by_status(self, status: str) -> list[Job]:
        """The jobs that are ``done``, ``failed`` or ``missing``."""
        return [job for job in self.sweep.jobs if job.status == status]


def write_summary(
    folder: Path,
    *,
    command: str,
    dataset: SegmentationDataset | None,
    split: str,
    gallery: Sequence[str] = (),
) -> Summary:
    """Write ``sweep.csv``, ``sweep.html`` and ``figures/*.png`` into a sweep's folder.

    A job with a damaged record is shown as failed; a gallery that cannot be made is left out, and
    the page says why.

    Args:
        folder: The sweep's folder, with a folder for each job.
        command: What started the sweep.
        dataset: Gives the pictures of the gallery; without it there is none.
        split: The split whose scores are compared and whose pictures are shown.
        gallery: Names of the pictures to show; by default a few of different classes.

    Raises:
        InputError: The folder holds no job.
    """
    sweep = Sweep(read_jobs(folder), split)
    write_atomically(folder / "sweep.csv", to_csv(sweep))
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    chosen = charts(sweep)
    for chart in chosen:
        save_png(draw_panels(chart.panels), figures / f"{chart.name}.png")
    columns = [(job, _column(sweep, job)) for job in choose_jobs(sweep)]
    rows, no_gallery = _gallery(sweep, dataset, [job for job, _ in columns], gallery)
    if rows:
        _save_gallery(figures / "gallery.png", sweep, rows, [lines for _, lines in columns])
    found = effects(sweep)
    class_axes = named_axes(sweep) or [effect.axis for effect in found[:1]]
    class_places = list(group(sweep.scored, class_axes))
    with_classes = 1 < len(class_places) <= MOST_CLASS_COLUMNS
    script = Path(__file__).with_name("sort.js").read_text()
    headings, jobs = job_table(sweep)
    page = render(
        Path(__file__).with_name("summary.html.j2"),
        title=_title(sweep, folder),
        sweep=sweep,
        lead=best_in_words(sweep),
        progress=progress(sweep),
        best_command=command_of(sweep.best) if sweep.best else "",
        several_seeds=any(len(jobs) > 1 for jobs in list(sweep.settings.values())[:1]),
        effects=found,
        noise=noise(sweep),
        no_help=no_help(sweep),
        charts=chosen,
        drawn=lambda panel: Markup(svg(draw_panels([panel], legend=False))),
        class_axes=class_axes,
        class_places=class_places,
        classes=class_ious(sweep, class_axes) if with_classes else {},
        columns=columns,
        rows=rows,
        no_gallery=no_gallery,
        class_names=dataset.classes if dataset else (),
        class_colours=class_colours(len(dataset.classes) if dataset else 0),
        cost=_cost(sweep),
        problems=[
            (job, label(job, sweep.axes)) for job in sweep.jobs if job.status != DONE or job.error
        ],
        headings=headings,
        first_heading=headings[len(sweep.axes)],
        jobs=jobs,
        computed=computed,
        brief=brief,
        command=command,
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        data_uri=data_uri,
    )
    write_atomically(folder / "sweep.html", page)
    return Summary(folder / "sweep.html", sweep)


def _title(sweep: Sweep, folder: Path) -> str:
    keys = ", ".join(axis.key for axis in sweep.axes)
    return f"Sweep over {keys}" if keys else f"Sweep {folder.resolve().name}"


def progress(sweep: Sweep) -> str:
    """How many jobs ended how."""
    counts = {
        status: sum(job.status == status for job in sweep.jobs)
        for status in (DONE, FAILED, MISSING)
    }
    parts = [f"{counts[DONE]} of {len(sweep.jobs)} jobs done"]
    parts += [f"{counts[status]} {status}" for status in (FAILED, MISSING) if counts[status]]
    return f"{', '.join(parts)}."


def _cost(sweep: Sweep) -> str:
    totals = {job.folder.name: job.seconds["total"] for job in sweep.done if "total" in job.seconds}
    if not totals:
        return "No job has left how long it took."
    longest = max(totals, key=lambda name: totals[name])
    middle = sorted(totals.values())[len(totals) // 2]
    return (
        f"Together the jobs took {sum(totals.values()):,.1f} seconds; the longest, {longest}, "
        f"{totals[longest]:,.1f}, the median {middle:,.1f}."
    )


def _column(sweep: Sweep, job: Job) -> list[str]:
    """A setting in short lines."""
    lines = [label(job, [axis], short=True) for axis in sweep.factors]
    return shorten(lines, 30) or ["masks"]


def _gallery(
    sweep: Sweep, dataset: SegmentationDataset | None, jobs: Sequence[Job], ids: Sequence[str]
) -> tuple[list[Row], str]:
    """The rows of the gallery, or none and the reason."""
    if dataset is None:
        return [], "No data set was given to take pictures from."
    if not jobs:
        return [], "No job has left masks."
    data_axes = [axis.key for axis in sweep.axes if axis.key.split(".")[0] == "dataset"]
    if data_axes:
        return [], f"The jobs may not show the same pictures: {', '.join(data_axes)} differs."
    try:
        pictures = dataset.pictures(sweep.split)
        if not ids:  # with save=shown the jobs have masks of a few
            there = file_names(jobs[0].folder / "masks")
            pictures = [picture for picture in pictures if f"{picture.id}.png" in there]
        return make_rows(dataset, choose_pictures(pictures, ids or None, SAVED), jobs), ""
    except InputError as error:
        return [], str(error)


def _save_gallery(
    path: Path, sweep: Sweep, rows: Sequence[Row], columns: Sequence[Sequence[str]]
) -> None:
    drawn = []
    for row in rows[:STANDALONE_ROWS]:
        shown = [("picture", row.image)]
        shown += [("truth", row.truth)] if row.truth else []
        for lines, mask in zip(columns, row.masks, strict=True):
            shown += [("\n".join(lines), mask[0])] if mask else []
        drawn.append((row.picture.id, shown))
    save_png(draw_gallery(f"Pseudo masks, {sweep.split}", drawn), path)


def _masks(split: str, jobs: Sequence[Job]) -> float:
    """Mean mIoU of the masks that networks learnt from."""
    return average(job.metrics.get(f"{split}/masks/miou", math.nan) for job in jobs)


def print_summary(summary: Summary) -> None:
    """Print the best settings, what failed and why, and where the page is."""
    sweep, console = summary.sweep, Console()
    table = Table(*(escape(axis.key) for axis in sweep.factors), title=f"mIoU (%) on {sweep.split}")
    columns: dict[str, Callable[[list[Job]], float]] = {"mIoU": sweep.mean, "CAM": sweep.baseline}
    if sweep.mask_splits:
        del columns["CAM"]
        columns |= {f"masks of {name}": partial(_masks, name) for name in sweep.mask_splits}
        columns["of full supervision"] = lambda jobs: average(map(sweep.share, jobs))
    for heading in columns:
        table.add_column(heading, justify="right")
    for place, jobs in list(sweep.settings.items())[:PRINTED]:
        numbers = [100 * value(jobs) for value in columns.values()]
        cells = ("" if math.isnan(value) else f"{value:.1f}" for value in numbers)
        table.add_row(*(escape(brief(text)) for text in place), *cells)
    if sweep.settings:
        console.print(table)
        if len(sweep.settings) > PRINTED:
            console.print(f"and {len(sweep.settings) - PRINTED} settings more")
    for job in summary.by_status(FAILED):
        line = f"failed: {job.folder.name} ({label(job, sweep.axes)}): {job.error}"
        console.print(escape(line), soft_wrap=True)
    for job in summary.by_status(MISSING):
        line = f"not finished: {job.folder.name} ({label(job, sweep.axes)})"
        console.print(escape(line), soft_wrap=True)
    if sweep.best:
        console.print(escape(f"Best: {command_of(sweep.best)}"), soft_wrap=True)
    console.print(escape(f"{progress(sweep)} Summary: {summary.page}"), soft_wrap=True)


def summarise(folder: Path, split: str | None = None, gallery: Sequence[str] = ()) -> Summary:
    """Write and print the summary of a sweep whose settings its jobs' files tell.

    Args:
        folder: The sweep's folder, with a folder for each job.
        split: The split that is compared; by default the last that has maps.
        gallery: See :func:`write_summary`.

    Raises:
        InputError: The folder holds no job.
    """
    dataset = _dataset(folder)
    summary = write_summary(
        folder,
        command=_command(folder),
        dataset=dataset,
        split=split or (dataset.map_splits[-1] if dataset else "val"),
        gallery=gallery,
    )
    print_summary(summary)
    return summary


def _dataset(folder: Path) -> SegmentationDataset | None:
    """The data set of the first job that left its config; None, and a line, where there is none."""
    from omegaconf import OmegaConf

    from lpcam.programs.build import build
    from lpcam.programs.entry import USER_ERRORS

    path = next(iter(sorted(folder.glob("*/config.yaml"))), None)
    try:
        if path is None:
            raise InputError(f"{folder}: no job has a config.yaml")
        dataset: SegmentationDataset = build(OmegaConf.load(path).dataset)
        dataset.prepare(labelled=False)
    except (*USER_ERRORS, OSError, AttributeError, yaml.YAMLError) as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return None
    return dataset


def _command(folder: Path) -> str:
    """The command that Hydra recorded for a sweep, or this one."""
    try:
        record = yaml.safe_load((folder / "multirun.yaml").read_text("utf-8"))
        overrides = [str(text) for text in record["hydra"]["overrides"]["task"]]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return shlex.join(["lpcam", "summary", str(folder)])
    return shlex.join(["python", "infer.py", "-m", *overrides])
