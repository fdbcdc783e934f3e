"""What a sweep found: its best setting, how much each axis matters, and what does not help."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lpcam.sweeps.jobs import DONE, NOTHING, Axis, Job, brief, find_axes, group, in_order

# Name, factor, format.
METRICS = {
    "miou": ("mIoU (%)", 100, "{:.1f}"),
    "precision": ("precision (%)", 100, "{:.1f}"),
    "recall": ("recall (%)", 100, "{:.1f}"),
    "threshold_width": ("threshold width", 1, "{:.2f}"),
}
SMALL = 0.005  # a difference of mIoU that nobody would choose a setting for
RESULTS = {
    "cam": "CAM",
    "lpcam": "LPCAM",
    "refined": "refined maps",
    "segmented": "networks",
    "segmented_crf": "networks with a CRF",
}


class Sweep:
    """The jobs of a sweep, seen along its axes.

    Args:
        jobs: All of them.
        split: The split whose scores are compared.

    Attributes:
        jobs: In the order of the axes.
        axes: What differs between them.
    """

    def __init__(self, jobs: Iterable[Job], split: str) -> None:
        jobs = list(jobs)
        self.axes = find_axes(jobs)
        self.jobs = in_order(jobs, self.axes)
        self.split = split

    @property
    def done(self) -> list[Job]:
        """The jobs that ended well."""
        return [job for job in self.jobs if job.status == DONE]

    @cached_property
    def scored(self) -> list[Job]:
        """Those that have a score to compare."""
        return [job for job in self.done if not math.isnan(job.score(self.split, "miou"))]

    @property
    def factors(self) -> list[Axis]:
        """The axes that make settings: all but seeds."""
        return [axis for axis in self.axes if not axis.seed]

    @property
    def is_grid(self) -> bool:
        """Whether the jobs, done or not, are most combinations of the axes' values."""
        combinations = math.prod(len(axis.values) for axis in self.factors)
        return 2 * len(group(self.jobs, self.factors)) >= combinations

    @cached_property
    def settings(self) -> dict[tuple[str, ...], list[Job]]:
        """The scored jobs of each setting, which differ in seeds only; the best setting first."""
        found = group(self.scored, self.factors)
        return dict(sorted(found.items(), key=lambda item: -self.mean(item[1])))

    @property
    def best(self) -> Job | None:
        """The first job of the best setting."""
        return next((jobs[0] for jobs in self.settings.values()), None)

    @property
    def metrics(self) -> list[str]:
        """Those of :data:`METRICS` that any job has."""
        return [name for name in METRICS if not math.isnan(self.mean(self.scored, name))]

    def mean(self, jobs: Iterable[Job], metric: str = "miou") -> float:
        """Mean of a metric of the compared stage over the jobs that have it, or NaN."""
        return average(job.score(self.split, metric) for job in jobs)

    def baseline(self, jobs: Iterable[Job]) -> float:
        """Mean mIoU of CAM over the jobs that have it, or NaN."""
        return average(job.baseline(self.split) for job in jobs)

    @property
    def mask_splits(self) -> list[str]:
        """Splits on which the masks that networks learnt from are scored."""
        keys = [key for job in self.done for key in job.metrics if key.endswith("/masks/miou")]
        return list(dict.fromkeys(key.split("/")[0] for key in keys))

    def share(self, job: Job) -> float:
        """MIoU as a share of that of full supervision, or NaN.

        That is the network which learnt from the true masks and differs in nothing else.
        """
        others = [axis for axis in self.axes if axis.key != "masks"]
        ceiling = average(
            other.score(self.split, "miou")
            for other in self.done
            if other.values.get("masks") == "truth"
            and all(other.value(axis) == job.value(axis) for axis in others)
        )
        return job.score(self.split, "miou") / ceiling

    @property
    def stages(self) -> list[str]:
        """Names of the results that the jobs compare."""
        return [RESULTS[stage] for stage in RESULTS if stage in self._compared]

    @property
    def _compared(self) -> set[str]:
        return {job.stage(self.split) for job in self.scored}


def average(values: Iterable[float]) -> float:
    """Mean of the values that are known; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def label(job: Job, axes: Sequence[Axis], *, short: bool = False, glue: str = ", ") -> str:
    """A job's places on axes as its overrides, with the whole keys or the ends of them."""
    return glue.join(
        f"{axis.name if short else axis.key}={brief(job.value(axis))}" for axis in axes
    )


def comparable(sweep: Sweep, axis: Axis) -> list[Job]:
    """The scored jobs that tell what an axis does, other things being equal.

    In a sweep with gaps these are the jobs whose partners, which differ from them in this axis
    alone, are all there; without any such jobs, all of them.
    """
    others = [other for other in sweep.axes if other != axis]
    values = {job.value(axis) for job in sweep.scored}
    whole = [
        job
        for block in group(sweep.scored, others).values()
        if {job.value(axis) for job in block} == values
        for job in block
    ]
    return whole or sweep.scored


@dataclass(frozen=True)
class Effect:
    """How much an axis matters.

    Attributes:
        axis: Which.
        means: The mean mIoU at each of its values that has a score.
    """

    axis: Axis
    means: Mapping[str, float]

    @property
    def best(self) -> str:
        """The value with the highest mean."""
        return max(self.means, key=lambda value: self.means[value])

    @property
    def worst(self) -> str:
        """The value with the lowest mean."""
        return min(self.means, key=lambda value: self.means[value])

    @property
    def range(self) -> float:
        """From the lowest to the highest mean, in 0..1."""
        return self.means[self.best] - self.means[self.worst]


def effects(sweep: Sweep) -> list[Effect]:
    """The effect of every axis that is no seed, the largest first.

    None in a random search, where hardly two jobs share a value.
    """
    found = []
    for axis in sweep.factors if sweep.is_grid else ():
        places = group(comparable(sweep, axis), [axis])
        means = {value: sweep.mean(places[value,]) for value in axis.values if (value,) in places}
        if len(means) > 1:
            found.append(Effect(axis, means))
    return sorted(found, key=lambda effect: -effect.range)


def noise(sweep: Sweep) -> float:
    """Standard deviation of mIoU between the seeds of a setting, mean over settings, or NaN."""
    spreads = [
        float(np.std([job.score(sweep.split, "miou") for job in jobs], ddof=1))
        for jobs in sweep.settings.values()
        if len(jobs) > 1
    ]
    return average(spreads)


def best_in_words(sweep: Sweep) -> str:
    """The best setting and its score; empty without any score."""
    job = sweep.best
    if job is None:
        return ""
    jobs = next(iter(sweep.settings.values()))
    values = [100 * job.score(sweep.split, "miou") for job in jobs]
    what = f"mIoU {np.mean(values):.1f}"
    if len(jobs) > 1:
        what += (
            f" as mean of {len(jobs)} seeds (standard deviation {np.std(values, ddof=1):.1f}, "
            f"{min(values):.1f} to {max(values):.1f})"
        )
    cam = 100 * sweep.baseline(jobs)
    if not math.isnan(cam):
        what += f", {np.mean(values) - cam:+.1f} points against CAM ({cam:.1f})"
    if not sweep.factors:
        return f"On {sweep.split}: {what}."
    return f"Best on {sweep.split}: {label(job, sweep.factors)} with {what}."


def command_of(job: Job) -> str:
    """The command that runs a job again, of a study as a sweep of this job alone."""
    return shlex.join(["python", "infer.py", *job.overrides])


def no_help(sweep: Sweep) -> list[str]:
    """What does not help, in sentences computed from the numbers."""
    seeds = noise(sweep)
    limit = SMALL if math.isnan(seeds) else max(SMALL, seeds)
    why = "" if limit == SMALL else ", no more than the seeds' standard deviation"
    sentences = []
    for effect in effects(sweep):
        if effect.range < limit:
            sentences.append(
                f"{effect.axis.key} hardly matters: its means lie within "
                f"{100 * effect.range:.1f} points{why}."
            )
            continue
        sentences += _no_help_along(effect)
    below = [
        (sweep.mean(jobs) - sweep.baseline(jobs), jobs[0])
        for jobs in sweep.settings.values()
        if sweep.mean(jobs) < sweep.baseline(jobs)
    ]
    if below and sweep.factors:
        loss, job = min(below, key=lambda pair: pair[0])
        sentences.append(
            f"Below CAM: {len(below)} of {len(sweep.settings)} settings; the worst, "
            f"{label(job, sweep.factors)}, by {-100 * loss:.1f} points."
        )
    return sentences


def _no_help_along(effect: Effect) -> list[str]:
    axis, means = effect.axis, effect.means
    nothing = next((value for value in means if value.lower() in NOTHING), None)
    if nothing is not None:
        losses = [
            f"{value} ({100 * (mean - means[nothing]):+.1f} points)"
            for value, mean in means.items()
            if value != nothing and mean <= means[nothing]
        ]
        return [f"No help against {axis.key}={nothing}: {', '.join(losses)}."] if losses else []
    last = list(means)[-1]
    if axis.numeric and effect.best != last:
        return [
            f"{axis.key} above {brief(effect.best)} does not help: "
            f"{100 * means[effect.best]:.1f} there, {100 * means[last]:.1f} at {brief(last)}."
        ]
    return []


def class_ious(sweep: Sweep, axes: Sequence[Axis]) -> dict[str, dict[tuple[str, ...], float]]:
    """Mean IoU of each class at each place on some axes.

    Args:
        sweep: The sweep.
        axes: The axes; other axes are averaged over.

    Returns:
        By class, background first as in the metrics, then by the values on the axes.
    """
    found: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for place, jobs in group(sweep.scored, axes).items():
        for job in jobs:
            start = f"{sweep.split}/{job.stage(sweep.split)}/iou/"
            for key, value in job.metrics.items():
                if key.startswith(start):
                    cells = found.setdefault(key.removeprefix(start), {})
                    cells.setdefault(place, []).append(value)
    return {
        name: {place: average(values) for place, values in cells.items()}
        for name, cells in found.items()
    }
