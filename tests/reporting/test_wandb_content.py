"""What real offline runs hold, read back with W&B's own reader of its run files."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from experiments import dashboard
from lpcam.reporting.tracking import recording, start
from lpcam.reporting.wandb_content import log_results
from tests.reporting.wandb_runs import (
    CHOICES,
    CLASSES,
    METRICS,
    SCORES,
    Run,
    log_study,
    logged_out,
    shown,
)


@pytest.fixture(autouse=True, scope="module")
def nobody_is_logged_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with logged_out(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return log_study(tmp_path_factory.mktemp("study"))


def test_metrics_have_the_names_of_the_file_and_a_maximum(study: list[Run]) -> None:
    for run in study[1:]:
        assert run.history.items() >= METRICS.items()
        summaries = {m["name"]: m["summary"] for m in run.all("metric") if "summary" in m}
        assert summaries == {"val/cam/miou": {"max": True}, "val/lpcam/miou": {"max": True}}


def test_the_curve_has_every_threshold_of_every_stage(study: list[Run]) -> None:
    columns, rows = study[1].table("val/curve_table")
    assert columns == ["stage", "threshold", "miou", "precision", "recall"]
    # NO_CAT: IoU 40/70, 0, 1. NONE: IoU 40/100, 0, 0.
    no_cat, none = (40 / 70 + 1) / 3, 0.4 / 3
    expected = [
        ["cam", 0, no_cat, 1, 0.5],
        ["cam", 0.5, none, None, 0],
        ["cam", 1, none, None, 0],
        ["lpcam", 0, no_cat, 1, 0.5],
        ["lpcam", 0.5, 1, 1, 1],
        ["lpcam", 1, none, None, 0],
    ]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    for row, right in zip(rows, expected, strict=True):
        assert row[2:] == [None if v is None else pytest.approx(v) for v in right[2:]]
    chart = study[1].config["_wandb.visualize.val/curve"]["panel_config"]
    assert chart["fieldSettings"] == {"x": "threshold", "y": "miou", "stroke": "stage"}


def test_the_class_table_is_at_each_stages_best_threshold(study: list[Run]) -> None:
    columns, rows = study[1].table("val/classes")
    assert columns == ["class", "cam", "lpcam"]
    assert rows == [["background", pytest.approx(4 / 7), 1], ["cat", 0, 1], ["dog", 1, 1]]


def test_every_run_shows_the_same_pictures_under_the_same_keys(study: list[Run]) -> None:
    keys = [
        {key for key in run.history if key.startswith(("pictures/", "overlays/"))}
        for run in study[1:]
    ]
    assert keys[0] == keys[1]
    for run, pixel in zip(study[1:], (1, 2), strict=True):
        logged = shown(pixel)
        key = "pictures/2007_000032"
        with Image.open(run.file(run.history[f"{key}.path"])) as picture:
            assert picture.size == (64, 48)
            assert np.allclose(np.asarray(picture)[20, 20], (200, 10, 10), atol=4)
        for name, mask in logged.masks.items():
            with Image.open(run.file(run.history[f"{key}.masks.{name}.path"])) as stored:
                assert (np.asarray(stored) == mask).all()
            labels = run.config["_wandb"]["mask/class_labels"][f"{key}_wandb_delimeter_{name}"]
            assert labels["value"] == {
                "0": "background",
                "1": "cat",
                "2": "dog",
                "255": "unknown",
            }
        assert run.history["overlays/2007_000032.captions"] == ["picture", "truth", "lpcam"]
        drawn = run.history["overlays/2007_000032.filenames"]
        assert len(drawn) == len(set(drawn)) == 3
        for path in drawn:
            with Image.open(run.file(path)) as picture:
                assert picture.size == (64, 48)
        with Image.open(run.file(run.history["figures/gallery.path"])) as figure:
            assert figure.size == (20, 10)


def test_artifacts_lead_from_the_classifier_to_the_results(study: list[Run]) -> None:
    trained = study[0].artifacts["classifier-abc"]
    assert trained["type"] == "classifier"
    for run in study[1:]:
        assert run.artifacts.keys() == {"prototypes", "metrics", "classifier-abc"}
        used = run.artifacts["classifier-abc"]
        assert used["use_after_commit"]
        assert used["digest"] == trained["digest"]
        made = run.artifacts["metrics"]
        assert "use_after_commit" not in made
        (entry,) = made["manifest"]["contents"]
        assert Path(entry["local_path"]) == run.folder.parents[1] / "metrics.json"
    assert len({run.artifacts["prototypes"]["digest"] for run in study[1:]}) == 2


def test_what_is_to_be_sent_lies_in_the_runs_folder(study: list[Run]) -> None:
    for run in study[1:]:
        root = run.folder.parents[2]
        for artifact in run.all("artifact"):
            for entry in artifact["manifest"]["contents"]:
                path = Path(entry["local_path"])
                assert path.is_relative_to(root)
                assert path.stat().st_size == int(entry["size"])


def test_the_dashboard_shows_what_runs_log(study: list[Run]) -> None:
    spec = dashboard.specification("p", "e", "sweep_k", "val", ["2007_000032"])
    run = study[1]
    summary = {key for record in run.all("summary") for key in record["update"]}
    media = {key.rsplit(".", 1)[0] for key in run.history}
    columns, _ = run.table("val/curve_table")
    workspace, report = dashboard.build(spec)  # which checks every name and type
    assert [section.name for section in workspace.sections] == [s["name"] for s in spec["sections"]]
    assert len(report.blocks) == 2 * len(workspace.sections)
    for panel in (panel for section in spec["sections"] for panel in section["panels"]):
        values = [panel.get(name) for name in ("x", "y", "z", "groupby")]
        for value in [*values, *panel.get("columns", [])]:
            if value and value.startswith("config."):
                assert value.removeprefix("config.") in run.config
            elif value:
                assert value.removeprefix("summary.").removesuffix(".max") in summary
        for key in panel.get("media_keys", []):
            assert key in media
        if "table_name" in panel:
            assert panel["table_name"] in media
        if "query" in panel:
            assert panel["query"]["summaryTable"]["tableKey"] in media
            assert set(panel["chart_fields"].values()) <= set(columns)


def run_dashboard(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *arguments])
    dashboard.main()


def test_without_a_login_the_dashboard_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first.json", "second.json"):
        run_dashboard(
            monkeypatch, "--group", "sweep_k", "--pictures", "a", "--output", str(tmp_path / name)
        )
    printed = capsys.readouterr().out
    assert "Not logged in" in printed
    assert "Thresholds" in printed
    text = (tmp_path / "first.json").read_text()
    assert text == (tmp_path / "second.json").read_text()
    spec = json.loads(text)
    assert spec["group"] == "sweep_k"
    panels = {section["name"]: section["panels"] for section in spec["sections"]}
    assert panels.keys() == {"Prototypes", "Thresholds", "Refiners", "Classes", "Pictures"}
    assert panels["Pictures"][0]["media_keys"] == ["pictures/a"]


def test_other_loggers_get_settings_and_metrics(tmp_path: Path) -> None:
    log = start(CSVLogger(tmp_path, "csv", ""), {"prototypes": {"k": 4}}, CHOICES)
    with recording():
        log_results(log, metrics=METRICS, scores=SCORES, classes=CLASSES)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["val/lpcam/miou"]) == 1
    assert "prototypes/k: 4" in (tmp_path / "csv" / "hparams.yaml").read_text()
