"""The jobs of a sweep as their folders tell: settings, how each ended, scores and cost."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lpcam.errors import InputError
from lpcam.programs.done import checked_metrics

DONE, FAILED, MISSING = "done", "failed", "missing"
DEFAULT = "default"  # stands where a job does not override what others do
SIGNS = (".hydra/overrides.yaml", "DONE.json", "FAILED.txt")  # of a job's folder
NOTHING = ("none", "null", "false")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: Its folder.
        overrides: Its overrides, as Hydra wrote them.
        status: ``done``, ``failed``, or ``missing`` if it never started or was killed.
        error: What is wrong, one line; empty if nothing is.
        metrics: Scores by ``<split>/<stage>/<metric>``, fractions; none without true masks.
        seconds: ``total`` and the seconds of each stage that this job computed.
    """

    folder: Path
    overrides: tuple[str, ...] = ()
    status: str = MISSING
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def values(self) -> dict[str, str]:
        """Text of each overridden value by key, the last of several."""
        parts = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+"): value for key, _, value in parts}

    def value(self, axis: "Axis") -> str:
        """The job's place on an axis."""
        return self.values.get(axis.key, DEFAULT)

    def stage(self, split: str) -> str:
        """The stage that is compared: the last that has scores, else what masks come from."""
        for stage in ("segmented_crf", "segmented", "refined"):
            if f"{split}/{stage}/miou" in self.metrics:
                return stage
        return "cam" if self.values.get("refiner.source") == "cam" else "lpcam"

    def score(self, split: str, metric: str) -> float:
        """A metric of the compared stage; NaN where it is missing."""
        return self.metrics.get(f"{split}/{self.stage(split)}/{metric}", math.nan)

    def baseline(self, split: str) -> float:
        """MIoU of plain CAM; NaN where it is missing."""
        return self.metrics.get(f"{split}/cam/miou", math.nan)


@dataclass(frozen=True)
class Axis:
    """An override whose value differs between jobs.

    Attributes:
        key: Its key, such as ``prototypes.k``.
        values: Texts of its values: ascending numbers, or names with "none" and the like first.
        name: The end of the key that no other axis shares, such as ``k``.
    """

    key: str
    values: tuple[str, ...]
    name: str

    @property
    def seed(self) -> bool:
        """Whether it only repeats the same setting with other random numbers."""
        return self.key.split(".")[-1] == "seed"

    @property
    def numeric(self) -> bool:
        """Whether its values have distances; seeds have none."""
        return not self.seed and None not in map(number, self.values)

    @property
    def numbers(self) -> np.ndarray:
        """The values of a numeric axis, float64."""
        return np.array([number(text) for text in self.values], float)


def number(text: str) -> float | None:
    """The finite number that a text is, if it is one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def brief(text: str) -> str:
    """A value as people read it: a number with at most five digits."""
    value = number(text)
    return text if value is None or len(text) <= 7 else f"{value:.5g}"


def read_jobs(folder: Path) -> list[Job]:
    """Read every job of a sweep, by folder name. What cannot be read is that job's error.

    Args:
        folder: The sweep's folder.

    Raises:
        InputError: It is no folder, or holds no job.
    """
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    jobs = [_read_job(f) for f in folders if any((f / sign).is_file() for sign in SIGNS)]
    if not jobs:
        raise InputError(f"{folder}: holds no job; give the folder of a sweep made by infer.py -m")
    return jobs


def _read_job(folder: Path) -> Job:
    problems = []
    overrides: tuple[str, ...] = ()
    try:
        overrides = _read_overrides(folder / ".hydra" / "overrides.yaml")
    except InputError as error:
        problems.append(str(error))
    done, failed = folder / "DONE.json", folder / "FAILED.txt"
    metrics: dict[str, float] = {}
    seconds: dict[str, float] = {}
    status = MISSING
    if done.is_file():  # an earlier failure may have left FAILED.txt beside it
        status = DONE
        try:
            record = _read_json(done)
            seconds = _numbers(record.get("seconds"))
            if "metrics" not in record and (folder / "metrics.json").is_file():
                record = {"metrics": _read_json(folder / "metrics.json")}
            if "check" in record:  # earlier versions wrote none
                checked_metrics(record)
            metrics = _numbers(record.get("metrics"))
        except InputError as error:
            status = FAILED
            problems.append(str(error))
    elif failed.is_file():
        status = FAILED
        lines = failed.read_text("utf-8", errors="replace").split("\n")
        problems.append(next((line.strip()[:1000] for line in lines if line.strip()), "no reason"))
    return Job(folder, overrides, status, "; ".join(problems), metrics, seconds)


def _read_overrides(path: Path) -> tuple[str, ...]:
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: not readable ({_one_line(error)})") from error
    if not isinstance(value, list):
        raise InputError(f"{path.name}: not a list of overrides")
    return tuple(map(str, value))


def _read_json(path: Path) -> dict[str, Any]:
    remedy = "delete it and run the job again"
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: not readable ({_one_line(error)}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name}: holds no object; {remedy}")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a JSON object; anything else is left out."""
    items = values.items() if isinstance(values, dict) else ()
    return {
        key: float(value)
        for key, value in items
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    }


def find_axes(jobs: Sequence[Job]) -> list[Axis]:
    """The overrides whose values differ between jobs, in the order they are given in."""
    found: dict[str, None] = {}
    for job in jobs:
        found |= dict.fromkeys(job.values)
    texts = {key: {job.values.get(key, DEFAULT) for job in jobs} for key in found}
    swept = [key for key in found if len(texts[key]) > 1]
    return [Axis(key, tuple(sorted(texts[key], key=_order)), _name(key, swept)) for key in swept]


def _order(text: str) -> tuple[int, float, str]:
    value = number(text)
    if value is not None:
        return 1, value, text
    return (0 if text.lower() in NOTHING else 2), 0.0, text


def _name(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[start:])
        if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
            return name
    return key


def in_order(jobs: Iterable[Job], axes: Sequence[Axis]) -> list[Job]:
    """Jobs along the axes, the first axis slowest; equals by folder."""
    places = [{text: place for place, text in enumerate(axis.values)} for axis in axes]

    def key(job: Job) -> tuple[list[int], str]:
        pairs = zip(axes, places, strict=True)
        return [place[job.value(axis)] for axis, place in pairs], job.folder.name

    return sorted(jobs, key=key)


def group(jobs: Iterable[Job], axes: Sequence[Axis]) -> dict[tuple[str, ...], list[Job]]:
    """Jobs by their places on axes, in the order of the first job of each."""
    found: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        found.setdefault(tuple(job.value(axis) for axis in axes), []).append(job)
    return found
