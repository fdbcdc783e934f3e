"""A sweep over masks to learn from: the masks' mIoU, the networks', the share of the ceiling."""

import csv
from pathlib import Path

import pytest

from lpcam.sweeps.findings import Sweep, best_in_words
from lpcam.sweeps.jobs import read_jobs
from lpcam.sweeps.summary import print_summary, write_summary
from lpcam.sweeps.table import job_table
from tests.sweeps.test_summary import add_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for name, masks, network in (
            ("cam", 0.4, 0.42),
            ("lpcam", 0.5, 0.56),
            ("truth", None, 0.7),
        ):
            found = {"val/segmented/miou": network + seed / 10, "val/segmented/recall": 0.5}
            if masks:
                found |= {"val/masks/miou": masks, "train/masks/miou": masks + 0.01}
            overrides = [f"masks={name if name == 'truth' else f'runs/{name}'}", f"seed={seed}"]
            add_job(tmp_path, f"{name}{seed}", *overrides, metrics=found)
    return tmp_path


def test_networks_are_compared_with_their_masks_and_with_full_supervision(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(read_jobs(folder), "val")
    assert sweep.stages == ["networks"]
    assert "masks=truth with mIoU 75.0" in best_in_words(sweep)
    jobs = {job.folder.name: job for job in sweep.jobs}
    assert sweep.share(jobs["lpcam0"]) == pytest.approx(0.56 / 0.7)
    assert sweep.share(jobs["cam1"]) == pytest.approx(0.52 / 0.8)  # of its own seed
    assert sweep.share(jobs["truth1"]) == 1
    headings, rows = job_table(sweep)
    cells = {
        job.folder.name: dict(zip(headings, (cell.text for cell in row), strict=True))
        for job, row in rows
    }
    assert cells["lpcam0"]["masks of val (%)"] == "50.0"
    assert cells["lpcam0"]["masks of train (%)"] == "51.0"
    assert cells["lpcam0"]["of full supervision (%)"] == "80.0"
    assert cells["truth0"]["masks of val (%)"] == ""
    summary = write_summary(folder, command="", dataset=None, split="val")
    assert "of full supervision" in summary.page.read_text()
    with (folder / "sweep.csv").open() as file:
        assert {"val/segmented/miou", "val/masks/miou"} <= set(next(csv.reader(file)))
    print_summary(summary)
    assert "of full supervision" in " ".join(capsys.readouterr().out.split())
