# python experiments/dashboard.py --project lpcam --group sweep_k --pictures val_00003 val_00017
"""W&B's workspace and report of a study: K curve, thresholds, refiners, classes, same pictures.

Writes what it builds to a file first. Without a login that is all: the file says what the dashboard
will show, and the same command builds it once ``wandb login`` is done.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Panel = Mapping[str, Any]


def specification(
    project: str, entity: str | None, group: str | None, split: str, pictures: list[str]
) -> dict[str, Any]:
    """What the dashboard shows, as plain data: sections of panels.

    A panel is a class of wandb-workspaces and its arguments. A text that starts with ``config.`` or
    ``summary.`` stands for a column of the runs table.
    """
    miou = f"summary.{split}/lpcam/miou.max"
    k, tau = "config.prototypes/k", "config.thresholds/activation"
    mu_f, mu_b = "config.thresholds/class_score", "config.thresholds/context_score"
    sections: dict[str, list[Panel]] = {
        "Prototypes": [
            {"panel": "ScatterPlot", "title": "mIoU over K", "x": k, "y": miou,
             "running_ymean": True},
        ],
        "Thresholds": [
            {"panel": "ScatterPlot", "title": "mIoU over mu_f and mu_b", "x": mu_f, "y": mu_b,
             "z": miou},
            {"panel": "ParallelCoordinatesPlot", "title": "Settings and mIoU",
             "columns": [k, tau, mu_f, mu_b, miou]},
            {"panel": "CustomChart", "chart_name": "wandb/line/v0",
             "query": {"summaryTable": {"tableKey": f"{split}/curve_table"}},
             "chart_fields": {"x": "threshold", "y": "miou", "stroke": "stage"},
             "chart_strings": {"title": "mIoU over the background threshold"}},
        ],
        "Refiners": [
            {"panel": "BarPlot", "title": "mIoU of refined maps, by refiner and what it refined",
             "metrics": [f"{split}/refined/miou"], "groupby": "config.refined",
             "groupby_aggfunc": "mean"},
        ],
        "Classes": [{"panel": "WeavePanelSummaryTable", "table_name": f"{split}/classes"}],
        "Pictures": [
            {"panel": "MediaBrowser", "title": name, "num_columns": 2,
             "media_keys": [f"{kind}/{name}"]}
            for name in pictures for kind in ("pictures", "overlays")
        ],
    }  # fmt: skip
    return {
        "name": f"LPCAM: {group or 'all runs'}",
        "entity": entity,
        "project": project,
        "group": group,
        "columns": [f"summary:{split}/{s}/miou.max" for s in ("cam", "lpcam", "refined")],
        "sections": [{"name": name, "panels": panels} for name, panels in sections.items()],
    }


def build_panel(panel: Panel) -> Any:
    """The panel of wandb-workspaces that a part of the specification describes."""
    import wandb_workspaces.reports.v2 as wr

    def column(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("config."):
            return wr.Config(value.removeprefix("config."))
        if isinstance(value, str) and value.startswith("summary."):
            return wr.SummaryMetric(value.removeprefix("summary."))
        return value

    arguments = {key: column(value) for key, value in panel.items() if key != "panel"}
    if "columns" in arguments:
        columns = [wr.ParallelCoordinatesPlotColumn(column(c)) for c in arguments["columns"]]
        arguments["columns"] = columns
    return getattr(wr, panel["panel"])(**arguments)


def build(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    """The workspace and the report that a specification describes; neither is saved yet."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name}: not installed; pip install -e .[dashboard]")
    place = {"entity": spec["entity"], "project": spec["project"]}
    filters = ws.And(ws.Metric("Group") == spec["group"]) if spec["group"] else []
    sections, blocks = [], []
    for section in spec["sections"]:
        panels = [build_panel(panel) for panel in section["panels"]]
        sections.append(ws.Section(name=section["name"], panels=panels, is_open=True))
        grid = wr.PanelGrid(runsets=[wr.Runset(**place, filters=filters)], panels=panels)
        blocks += [wr.H2(section["name"]), grid]
    runs = ws.RunsetSettings(filters=filters, pinned_columns=spec["columns"])
    return (
        ws.Workspace(**place, name=spec["name"], sections=sections, runset_settings=runs),
        wr.Report(**place, title=spec["name"], blocks=blocks, width="fluid"),
    )


def newest_pictures(project: str, entity: str, group: str | None) -> list[str]:
    """The pictures that the newest run of a study shows."""
    import wandb

    runs = wandb.Api().runs(f"{entity}/{project}", {"group": group} if group else {}, "-created_at")
    keys = next((list(run.summary.keys()) for run in runs if run.job_type == "infer"), [])
    return sorted(key.removeprefix("pictures/") for key in keys if key.startswith("pictures/"))


def main() -> None:
    """Write the specification; build the dashboard if somebody is logged in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="lpcam")
    parser.add_argument("--entity", help="user or team; by default the one who is logged in")
    parser.add_argument("--group", help="the study, such as sweep_k; by default all runs")
    parser.add_argument("--split", default="val")
    parser.add_argument("--pictures", nargs="*", default=[], help="ids, if not the newest run's")
    parser.add_argument("--output", default="dashboard.json", type=Path)
    options = parser.parse_args()
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    online = os.environ.get("WANDB_MODE", "online") == "online" and wandb.login(prompt=False)
    entity, pictures = options.entity, options.pictures
    if online:
        entity = entity or wandb.Api().default_entity
        pictures = pictures or newest_pictures(options.project, entity, options.group)
    spec = specification(options.project, entity, options.group, options.split, pictures)
    options.output.write_text(json.dumps(spec, indent=1) + "\n")
    print(f"Specification: {options.output}")
    if online:
        for made in build(spec):
            made.save()
            print(made.url)
        return
    names = ", ".join(section["name"] for section in spec["sections"])
    print(
        f"Not logged in to W&B, so nothing was built. After  wandb login  this command makes a "
        f"workspace and a report in project {options.project} with these sections: {names}."
    )
    if not pictures:
        print("The pictures will be those of the newest run; without a login give --pictures ID.")


if __name__ == "__main__":
    main()
