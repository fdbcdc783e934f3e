"""How benchmarks are measured: interleaved rounds beside a control, memory in own processes.

Methods that are compared run one after the other in every round, and each round begins with
another of them, so that what else the machine does meets all alike. A control says what that was:
where it varies by more than :data:`UNSTEADY`, the whole section is marked invalid.
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
UNSTEADY = 0.1
LEAST = 3  # times that a spread can be told from
PACKAGES = (
    "torch", "timm", "numpy", "scipy", "scikit-learn", "pytorch-lightning", "torchcam", "captum",
    "grad-cam", "faiss-cpu",
)  # fmt: skip
Method = Callable[[], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What every table is made with.

    Attributes:
        quick: Whether tiny sizes are taken, to see that it works; the numbers say nothing then.
        device: ``cpu`` or ``cuda``.
        threads: Of torch and of the packages compared with.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    @property
    def precisions(self) -> tuple[str, ...]:
        """What networks run in; processors have single precision only."""
        return ("fp32", "tf32", "bf16") if self.device == "cuda" else ("fp32",)

    def settle(self) -> None:
        """Wait for what a GPU still has to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def in_precision(precision: str, device: str) -> Iterator[None]:
    """Run networks in ``fp32``, ``tf32`` or ``bf16``."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def rounds(
    methods: Mapping[str, Method],
    count: int,
    *,
    warm_up: int = 3,
    least: int = 3,
    budget: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each method in interleaved rounds whose order rotates.

    Args:
        methods: What is compared, by name.
        count: Rounds.
        warm_up: Rounds before them that do not count.
        least: Rounds that a slow method takes part in; it sits out the later ones.
        budget: Seconds that a method may take in all without being slow.
        clock: Tells the time.
        settle: Called before the clock is read.

    Returns:
        For each method its seconds, of the first round first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    allowed = dict.fromkeys(methods, count)
    names = list(methods)
    for turn in range(-warm_up, count):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn >= allowed[name]:
                continue
            settle()
            start = clock()
            methods[name]()
            settle()
            took = clock() - start
            if turn >= 0:
                seconds[name].append(took)
            if turn <= 0:
                allowed[name] = int(min(max(budget / max(took, 1e-9), least), count))
    return seconds


def spread(times: Sequence[float]) -> float:
    """Interquartile range of some seconds, at least three."""
    low, _, high = statistics.quantiles(times, method="inclusive")
    return high - low


def is_steady(times: Sequence[float]) -> bool:
    """Whether a control varied little enough for the rest to be believed."""
    return len(times) >= LEAST and spread(times) <= UNSTEADY * statistics.median(times)


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long one method takes as another: the median over rounds.

    Both of a round ran within seconds of each other, which their medians over all rounds did not.
    """
    return statistics.median(a / b for a, b in zip(times, others, strict=False))


def timed_rows(seconds: Mapping[str, Sequence[float]], control: str | None = None) -> list[Row]:
    """A row of each method: least, median and spread of its seconds, and what it adds to a control.

    Args:
        seconds: What :func:`rounds` gave.
        control: The method that the others contain; None for no such.
    """
    rows = []
    for name, times in seconds.items():
        row: Row = {
            "name": name,
            "min": min(times),
            "median": statistics.median(times),
            "rounds": len(times),
        }
        if len(times) >= LEAST:
            row["iqr"] = spread(times)
        if control and name != control:
            paired = zip(times, seconds[control], strict=False)
            row["overhead"] = statistics.median(a - b for a, b in paired)
            row["ratio"] = ratio(times, seconds[control])
        rows.append(row)
    return rows


def target(text: str, measured: float, *, most: float = 0.0, least: float = 0.0) -> Row:
    """A ratio that was aimed at, and whether it was reached; one of the two bounds is given."""
    reached = measured <= most if most else measured >= least
    bound = f"at most {most:g}" if most else f"at least {least:g}"
    return {"text": text, "bound": bound, "measured": measured, "reached": bool(reached)}


def section(
    title: str,
    text: str,
    rows: Sequence[Row],
    *,
    targets: Sequence[Row] = (),
    control: Sequence[float] | None = None,
    value: str = "median",
) -> Row:
    """One table with its targets.

    Args:
        title: Its heading.
        text: What was measured, on what.
        rows: Its rows, each with a ``name``.
        targets: See :func:`target`.
        control: Seconds of the control; None where there is none.
        value: What the picture shows of each row.
    """
    return {
        "title": title,
        "text": text,
        "rows": list(rows),
        "targets": list(targets),
        "value": value,
        "control_spread": spread(control) / statistics.median(control) if control else 0.0,
        "valid": control is None or is_steady(control),
    }


@dataclass
class Counts:
    """What one call does, whatever the machine: no clock has a part in it.

    Attributes:
        forwards: Forward passes of the network.
        backwards: Backward passes that begin at its scores, however far they go.
        gflop: Billions of floating point operations that torch counts.
    """

    forwards: int = 0
    backwards: int = 0
    gflop: float = 0.0


def counts(method: Method, features: nn.Module, scores: nn.Module) -> Counts:
    """Count what a method does with the layers that give local features, and with all layers."""
    found = Counts()

    def forward(*_: object) -> None:
        found.forwards += 1

    def backward(*_: object) -> None:
        found.backwards += 1

    handles = [
        features.register_forward_hook(forward),
        scores.register_full_backward_pre_hook(backward),
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            method()
    finally:
        for handle in handles:
            handle.remove()
    found.gflop = counter.get_total_flops() / 1e9
    return found


def in_child(function: str, options: Options, name: str, **arguments: Any) -> Row:
    """Run one method in a process of its own, once; where all is quick, in this one.

    Args:
        function: ``module:name`` below this package; it takes the options and the arguments, and
            gives methods by name.
        options: The options.
        name: The method.
        arguments: Plain values.

    Returns:
        Its ``seconds``, the MB of its ``memory`` beyond what was there before, on a GPU that of the
        GPU, and where it returns a function, what that gives when all is measured.
    """
    described = json.dumps([function, asdict(options), name, arguments])
    if options.quick:
        return run_child(described)
    command = [sys.executable, "-m", f"{__package__}.child", described]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def run_child(described: str) -> Row:
    """The other end of :func:`in_child`."""
    function, given, name, arguments = json.loads(described)
    options = Options(**given)
    torch.set_num_threads(options.threads)
    module, _, maker = function.partition(":")
    methods = getattr(importlib.import_module(f"{__package__}.{module}"), maker)(
        options, **arguments
    )
    options.settle()
    before = restart_peak(options)
    start = time.perf_counter()
    returned = methods[name]()
    options.settle()
    found: Row = {"seconds": time.perf_counter() - start, "memory": (peak(options) - before) / 1e6}
    return found | (returned() if callable(returned) else {})


def restart_peak(options: Options) -> int:
    """Bytes that this process holds now; its peak counts from here on. Linux with glibc only."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would be taken for nothing
    Path("/proc/self/clear_refs").write_text("5")
    return peak(options)


def peak(options: Options) -> int:
    """The most bytes that this process has held.

    ``ru_maxrss`` would begin with what the process had that started this one.
    """
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def add_memory(rows: Sequence[Row], function: str, options: Options, **arguments: Any) -> None:
    """Add to rows what memory each takes in a process of its own."""
    for row in rows:
        row["memory"] = in_child(function, options, row["name"], **arguments)["memory"]


def machine(options: Options) -> Row:
    """What the numbers were measured on and with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("diff", "HEAD") else ""),
        "versions": versions,
    }


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@functools.cache
def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
