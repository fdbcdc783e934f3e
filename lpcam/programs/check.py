"""Look at a data set: ``lpcam check dataset=voc dataset.root=...``.

Opens every picture and mask of the splits in use, prints what is there, and ends with status 1 if
anything is missing, damaged or contradictory. ``--help`` lists the groups.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from lpcam.data.dataset import (
    Picture,
    SegmentationDataset,
    is_turned,
    multi_hot,
)
from lpcam.data.files import abbreviate
from lpcam.errors import InputError
from lpcam.programs.build import build
from lpcam.programs.entry import job, run
from lpcam.programs.folders import CONF

# Problems of a split that are printed; the rest are counted.
SHOWN = 5


@dataclass(frozen=True)
class SplitCheck:
    """What was found in a split.

    Attributes:
        pictures: How many there are; 0 if the split cannot be read.
        unlabelled: How many of them show no class.
        masks: How many of them have a mask.
        without_mask: The ids of those that have none.
        turned: The ids of those with an EXIF orientation, which is ignored.
        histogram: In how many pictures each class is ``(C,)``.
        problems: What is wrong, a line each.
    """

    pictures: int
    unlabelled: int
    masks: int
    without_mask: list[str]
    turned: list[str]
    histogram: np.ndarray
    problems: list[str]


def check_split(dataset: SegmentationDataset, split: str) -> SplitCheck:
    """Read everything that a split holds: labels, pictures and masks."""
    number = len(dataset.classes)
    try:
        pictures = dataset.pictures(split)
        labels = multi_hot(pictures, number)
    except InputError as error:
        return SplitCheck(0, 0, 0, [], [], np.zeros(number), [str(error)])
    masks, without_mask, turned, problems = 0, [], [], []
    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda picture: _check_picture(dataset, picture), pictures)
        shown = track(
            found,
            split,
            len(pictures),
            transient=True,
            console=console,
            disable=not console.is_terminal,
        )
        for picture, (masked, oriented, problem) in zip(pictures, shown, strict=True):
            masks += masked
            if oriented:
                turned.append(picture.id)
            if problem:
                problems.append(problem)
            elif not masked:
                without_mask.append(picture.id)
    unlabelled = int((labels.sum(1) == 0).sum())
    return SplitCheck(
        len(pictures), unlabelled, masks, without_mask, turned, labels.sum(0), problems
    )


def _check_picture(dataset: SegmentationDataset, picture: Picture) -> tuple[bool, bool, str]:
    """Whether a picture has a mask, and an EXIF orientation; what is wrong with it, or nothing."""
    image, mask, problem = dataset.look(picture)
    return mask is not None, image is not None and is_turned(image), problem


def print_tables(dataset: SegmentationDataset, checks: dict[str, SplitCheck]) -> None:
    """Print what each split holds, and in how many of its pictures each class is."""
    console = Console()
    console.print(escape(str(dataset.root)), soft_wrap=True)
    table = Table("split")
    for column in ("pictures", "without label", "masks", "problems"):
        table.add_column(column, justify="right")
    table.add_column("without mask")
    for split, check in checks.items():
        numbers = (check.pictures, check.unlabelled, check.masks, len(check.problems))
        table.add_row(split, *map(str, numbers), escape(abbreviate(check.without_mask)))
    console.print(table)
    console.print("Pictures that show each class")
    histogram = Table("class")
    for split in checks:
        histogram.add_column(split, justify="right")
    for index, name in enumerate(dataset.classes):
        counts = (str(int(check.histogram[index])) for check in checks.values())
        histogram.add_row(escape(name), *counts)
    console.print(histogram)


def _warnings(checks: dict[str, SplitCheck]) -> Iterator[str]:
    for split, check in checks.items():
        if check.turned:
            yield (
                f"{split}: {len(check.turned)} pictures have an EXIF orientation "
                f"({abbreviate(check.turned)}); it is ignored, masks and maps belong to the pixels "
                "as they are stored"
            )


def _problem_lines(checks: dict[str, SplitCheck]) -> Iterator[str]:
    for split, check in checks.items():
        yield from check.problems[:SHOWN]
        if len(check.problems) > SHOWN:
            yield f"{split}: {len(check.problems) - SHOWN} more problems like these"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="check")
@job
def check(cfg: DictConfig) -> None:
    """Check the data set of a config; end the program with status 1 on problems."""
    dataset: SegmentationDataset = build(cfg.dataset)
    unprepared = []
    try:
        dataset.prepare()
    except InputError as error:
        unprepared.append(str(error))
    checks = {split: check_split(dataset, split) for split in dataset.used_splits}
    print_tables(dataset, checks)
    for warning in _warnings(checks):
        print(f"warning: {warning}", file=sys.stderr)
    # What stopped prepare() was mostly met in its split again.
    problems = dict.fromkeys([*_problem_lines(checks), *unprepared])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def main() -> None:
    """Run the program with the process's arguments."""
    run(check)


if __name__ == "__main__":
    main()
