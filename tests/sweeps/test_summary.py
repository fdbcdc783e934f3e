import base64
import csv
import hashlib
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpcam.__main__ import main
from lpcam.data.folder import Folder
from lpcam.errors import InputError
from lpcam.seeds.palette import save_mask
from lpcam.sweeps.charts import charts, evenly
from lpcam.sweeps.figures import heat_cells, shorten
from lpcam.sweeps.findings import Sweep, best_in_words, class_ious, command_of, effects, no_help
from lpcam.sweeps.gallery import choose_jobs, make_rows
from lpcam.sweeps.jobs import Job, read_jobs
from lpcam.sweeps.summary import print_summary, write_summary
from lpcam.sweeps.table import computed, to_csv
from tests.pages import NASTY, Page


def scores(miou: float, *, cam: float | None = 0.25, stage: str = "lpcam") -> dict[str, float]:
    found = {f"val/{stage}/miou": miou, f"val/{stage}/recall": 0.5}
    return found if cam is None else {"val/cam/miou": cam, **found}


def add_job(
    sweep: Path,
    name: str,
    *overrides: str,
    metrics: Mapping[str, object] | None = None,
    failed: str | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Path:
    """A job's folder as a run leaves it; without metrics and failure it never ended."""
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    # JSON is YAML, so that any text can be an override here.
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if metrics is not None:
        record = {"config": "0", "seconds": seconds or {"total": 1.0}, "metrics": metrics}
        (folder / "DONE.json").write_text(json.dumps(record))
    if failed is not None:
        (folder / "FAILED.txt").write_text(failed)
    return folder


def made(axes: Mapping[str, Sequence[object]], score: object = None) -> Sweep:
    """A sweep of all combinations, without folders; the score is a function of the values."""
    jobs = []
    for i, values in enumerate(itertools.product(*axes.values())):
        overrides = tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        miou = score(*values) if callable(score) else 0.5 + i / 1000
        if miou is None:
            jobs.append(Job(Path(str(i)), overrides))
        else:
            jobs.append(Job(Path(str(i)), overrides, "done", metrics=scores(miou)))
    return Sweep(jobs, "val")


def write(folder: Path, **settings: object) -> Page:
    settings = {"command": "python infer.py -m", "dataset": None, "split": "val"} | settings
    write_summary(folder, **settings)
    return Page((folder / "sweep.html").read_text())


def test_the_csv_has_a_row_a_job_in_the_order_of_the_axes(tmp_path: Path) -> None:
    common = ("dataset=voc", "trainer=cpu")
    add_job(tmp_path, "c", *common, "prototypes.k=12", "seed=0", metrics=scores(0.5))
    add_job(tmp_path, "a", *common, "prototypes.k=4", "seed=1", failed="no memory,\nreally")
    add_job(tmp_path, "b", *common, "prototypes.k=12", "seed=1")
    odd = {"val/lpcam/miou": 1 / 3, "val/lpcam/iou/a,b": 0.0}
    add_job(tmp_path, "d", *common, "prototypes.k=4", "seed=0", metrics=odd, seconds={"total": 2})
    (tmp_path / "figures").mkdir()
    (tmp_path / "multirun.yaml").write_text("{}")

    assert to_csv(Sweep(read_jobs(tmp_path), "val")) == (
        "folder,status,prototypes.k,seed,"
        'val/lpcam/miou,"val/lpcam/iou/a,b",val/cam/miou,val/lpcam/recall,seconds\n'
        "d,done,4,0,0.3333333333333333,0.0,,,2.0\n"
        "a,failed,4,1,,,,,\n"
        "c,done,12,0,0.5,,0.25,0.5,1.0\n"
        "b,missing,12,1,,,,,\n"
    )


def test_axes_are_what_differs_between_jobs() -> None:
    overrides = [
        ["dataset=voc", "k=30", "refiner=sam", "a.floor=0.1", "+x.size=[0.5,1.0]", "a.seed=2"],
        ["dataset=voc", "k=4", "refiner=none", "a.floor=null", "x.size=[1.0]", "a.seed=1"],
        ["dataset=voc", "k=12", "refiner=crf", "a.floor=0.05", "++x.size=null", "extra=a=b"],
    ]
    sweep = Sweep([Job(Path(str(i)), tuple(own)) for i, own in enumerate(overrides)], "val")

    assert {axis.key: axis.values for axis in sweep.axes} == {
        "k": ("4", "12", "30"),
        "refiner": ("none", "crf", "sam"),
        "a.floor": ("null", "0.05", "0.1"),
        "x.size": ("null", "[0.5,1.0]", "[1.0]"),
        "a.seed": ("1", "2", "default"),
        "extra": ("a=b", "default"),
    }
    assert [axis.key for axis in sweep.axes if axis.numeric] == ["k"]
    assert [axis.key for axis in sweep.axes if axis.seed] == ["a.seed"]


def test_axes_have_the_shortest_names_that_tell_them_apart() -> None:
    sweep = made({"a.seed": [0, 1], "b.seed": [0, 1], "c.d.k": [1, 2], "seed": [0, 1], "u": [0, 1]})

    assert [axis.name for axis in sweep.axes] == ["a.seed", "b.seed", "k", "seed", "u"]


def test_the_best_setting_is_the_best_mean_over_seeds(tmp_path: Path) -> None:
    """The best single job belongs to another setting."""
    for seed, miou in enumerate([0.5, 0.75]):
        add_job(tmp_path, f"a{seed}", "x='b c'", "k=4", f"seed={seed}", metrics=scores(miou))
    for seed, miou in enumerate([0.7, 0.6]):
        add_job(tmp_path, f"b{seed}", "x='b c'", "k=8", f"seed={seed}", metrics=scores(miou))

    page = write(tmp_path)

    text = page.all_text()
    assert (
        "Best on val: k=8 with mIoU 65.0 as mean of 2 seeds (standard deviation 7.1, 60.0 to 70.0)"
        ", +40.0 points against CAM (25.0)." in text
    )
    (command,) = [text for tag, text in page.texts if tag == "pre" and "-m" not in text]
    assert shlex.split(command) == ["python", "infer.py", "x='b c'", "k=8", "seed=0"]


def test_heat_maps_hold_the_means_of_their_cells(tmp_path: Path) -> None:
    values = {("4", "0.1"): [0.25, 0.5], ("4", "0.3"): [0.75], ("8", "0.1"): [0.125, 0.375]}
    for (k, tau), mious in values.items():
        for seed, miou in enumerate(mious):
            name, overrides = f"{k}-{tau}-{seed}", (f"k={k}", f"tau={tau}", f"seed={seed}")
            add_job(tmp_path, name, *overrides, metrics=scores(miou))
    add_job(tmp_path, "failed", "k=8", "tau=0.3", "seed=0", failed="no")
    sweep = Sweep(read_jobs(tmp_path), "val")
    k, tau, _ = sweep.axes

    cells = heat_cells(sweep, sweep.scored, k, tau, "miou")

    np.testing.assert_array_equal(cells, [[0.375, 0.25], [0.75, math.nan]])
    page = write(tmp_path)
    start = next(i for i, (_, text) in enumerate(page.texts) if text.startswith("mIoU over"))
    drawn = [text for tag, text in page.texts[start:] if tag == "text"]
    # Its axes are tau, which matters more, from left to right, and k from top to bottom.
    assert [text for text in drawn if text in ("37.5", "75.0", "25.0", "n/a")][:4] == [
        *("37.5", "75.0"),
        *("25.0", "n/a"),
    ]


def additive(k: int, tau: float) -> float:
    return {4: 0.5, 8: 0.56, 12: 0.6}[k] + {0.1: 0.0, 0.3: 0.02}[tau]


@pytest.mark.parametrize("gaps", [[], [(12, 0.3)], [(4, 0.1), (8, 0.1)]])
def test_effects_compare_like_with_like(gaps: list[tuple[int, float]]) -> None:
    """With effects that add up, a sweep with gaps gives the same ranges as a whole one."""
    sweep = made(
        {"k": [4, 8, 12], "tau": [0.1, 0.3]},
        lambda k, tau: None if (k, tau) in gaps else additive(k, tau),
    )

    first, second = effects(sweep)

    assert (first.axis.key, first.best, first.worst) == ("k", "12", "4")
    assert first.range == pytest.approx(0.1)
    assert (second.axis.key, second.best, second.worst) == ("tau", "0.3", "0.1")
    assert second.range == pytest.approx(0.02)


def test_it_says_what_does_not_help() -> None:
    refiner = {"none": 0.5, "crf": 0.5625, "sam": 0.4375}
    refined = made({"refiner": list(refiner)}, refiner.__getitem__)
    assert no_help(refined) == ["No help against refiner=none: sam (-6.2 points)."]

    k = {4: 0.5, 8: 0.6, 50: 0.55}
    axes = {"k": list(k), "floor": [0.0, 0.1]}
    swept = made(axes, lambda k_, floor: k[k_] + 0.02 * floor - 0.001)
    assert no_help(swept) == [
        "k above 8 does not help: 60.0 there, 55.0 at 50.",
        "floor hardly matters: its means lie within 0.2 points.",
    ]

    noisy = made({"k": [4, 8], "seed": [0, 1]}, lambda k_, seed: k_ / 400 + 0.1 * seed)
    assert no_help(noisy) == [
        "k hardly matters: its means lie within 1.0 points, no more than the seeds' standard "
        "deviation.",
        "Below CAM: 2 of 2 settings; the worst, k=4, by 19.0 points.",
    ]


def test_a_rising_axis_gives_no_advice() -> None:
    assert no_help(made({"k": [4, 8, 12]}, lambda k: 0.5 + k / 100)) == []


@pytest.mark.parametrize(
    ("overrides", "stages", "compared"),
    [
        ((), {"cam": 0.1, "lpcam": 0.2}, 0.2),
        ((), {"cam": 0.1, "lpcam": 0.2, "refined": 0.15}, 0.15),
        (("refiner.source=cam",), {"cam": 0.1, "lpcam": 0.2, "refined": 0.3}, 0.3),
        (("refiner=none", "refiner.source=cam"), {"cam": 0.1, "lpcam": 0.2}, 0.1),
        ((), {"cam": 0.1}, math.nan),
    ],
)
def test_the_compared_stage(overrides, stages: dict[str, float], compared: float) -> None:
    metrics = {f"val/{stage}/miou": value for stage, value in stages.items()}
    job = Job(Path("job"), overrides, "done", metrics=metrics)

    assert job.score("val", "miou") == pytest.approx(compared, nan_ok=True)


FIVE = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({}, []),
        ({"k": FIVE}, ["lines"]),
        ({"k": FIVE, "seed": [0, 1]}, ["lines"]),
        ({"k": FIVE, "tau": [0.1, 0.2]}, ["lines", "heat_maps", "other_metrics"]),
        ({"k": FIVE, "use": ["both", "class"]}, ["lines", "bars"]),
        ({"refiner": ["none", "crf"], "refiner.source": ["cam", "lpcam"]}, ["bars"]),
        ({"use": "abcdef", "kind": "ghijkl"}, ["heat_maps", "other_metrics", "bars"]),
        (
            {"k": FIVE, "tau": [0.1, 0.2], "use": ["both", "class"]},
            ["lines", "heat_maps", "other_metrics", "bars"],
        ),
        ({"seed": [0, 1, 2]}, ["bars"]),
    ],
)
def test_plots_are_chosen_from_the_axes(axes: dict[str, Sequence], names: list[str]) -> None:
    assert [chart.name for chart in charts(made(axes))] == names


def test_three_axes_make_small_multiples() -> None:
    def titles(last: Sequence[object]) -> list[str]:
        sweep = made({"k": range(15), "mu": range(12), "x": last})
        maps = next(chart for chart in charts(sweep) if chart.name == "heat_maps")
        return [panel.title for panel in maps.panels]

    assert titles([0.1, 0.2]) == ["mIoU, x=0.1", "mIoU, x=0.2"]
    assert titles(range(11)) == [f"mIoU, x={x}" for x in (0, 1, 3, 4, 6, 7, 9, 10)]


def test_a_random_search_is_shown_job_by_job() -> None:
    rng = np.random.default_rng(0)
    jobs = [
        Job(Path(str(i)), (f"a={a}", f"b={b}"), "done", metrics=scores(a))
        for i, (a, b) in enumerate(rng.uniform(0.01, 1, (20, 2)))
    ]
    sweep = Sweep(jobs, "val")

    assert [chart.name for chart in charts(sweep)] == ["dots"]
    assert effects(sweep) == []
    best = max(jobs, key=lambda job: job.metrics["val/lpcam/miou"])
    assert sweep.best == best


def test_iou_of_each_class() -> None:
    jobs = [
        Job(
            Path(f"{refiner}{seed}"),
            (f"refiner={refiner}", f"seed={seed}"),
            "done",
            metrics={f"val/{stage}/miou": 0.5, f"val/{stage}/iou/a/b": base + seed / 4},
        )
        for refiner, stage, base in (("none", "lpcam", 0.25), ("crf", "refined", 0.5))
        for seed in (0, 1)
    ]
    sweep = Sweep(jobs, "val")

    assert class_ious(sweep, sweep.factors) == {"a/b": {("none",): 0.375, ("crf",): 0.625}}


def test_failed_and_missing_jobs_are_named_with_their_reason(tmp_path: Path) -> None:
    add_job(tmp_path, "well", "k=4", metrics=scores(0.5))
    add_job(tmp_path, "broken", "k=8", failed="k=8: too <few> features\nTraceback")
    add_job(tmp_path, "killed", "k=12")
    add_job(tmp_path, "mended", "k=16", metrics=scores(0.5), failed="of an earlier time")

    page = write(tmp_path)

    text = page.all_text()
    assert "2 of 4 jobs done, 1 failed, 1 missing." in text
    assert ", k=8: k=8: too <few> features" in text
    assert ", k=12: not finished; it never started, was killed, or is still running" in text
    assert "earlier time" not in text
    assert "Traceback" not in text
    (row,) = [row for row in page.rows if row[0] == "broken"]
    assert row[-1] == "failed"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"metrics": {"val/lpcam', "not readable"),
        (b"\xff\xfe\x00", "not readable"),
        (b"[1, 2]", "holds no object"),
        (b"[" * 100_000, "not readable"),
    ],
)
def test_a_damaged_record_is_reported(tmp_path: Path, content: bytes, problem: str) -> None:
    add_job(tmp_path, "well", "k=4", metrics=scores(0.5))
    folder = add_job(tmp_path, "damaged", "k=8", metrics=scores(0.75))
    (folder / "DONE.json").write_bytes(content)

    page = write(tmp_path)

    assert "1 of 2 jobs done, 1 failed." in page.all_text()
    (line,) = [text for _, text in page.texts if "DONE.json" in text]
    assert problem in line
    assert "delete it and run the job again" in line
    assert "mIoU 50.0" in page.all_text()


def test_what_is_no_number_is_no_metric(tmp_path: Path) -> None:
    odd = {"val/lpcam/recall": math.nan, "a": "text", "b": True, "c": None, "d": 10**400}
    add_job(tmp_path, "odd", metrics={"val/lpcam/miou": 0.5, **odd})
    add_job(tmp_path, "list", metrics={}).joinpath("DONE.json").write_text('{"metrics": []}')

    first, second = read_jobs(tmp_path)[::-1]

    assert first.metrics == {"val/lpcam/miou": 0.5}
    assert (second.status, second.metrics) == ("done", {})


def test_metrics_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = add_job(tmp_path, "job", metrics={})
    (folder / "DONE.json").write_text('{"config": "0"}')
    (folder / "metrics.json").write_text('{"val/lpcam/miou": 0.5}')

    assert read_jobs(tmp_path)[0].metrics == {"val/lpcam/miou": 0.5}


@pytest.mark.parametrize("content", [": :\n- [", "{a: 1}", "- !!python/object:os.system {}"])
def test_damaged_overrides_are_reported(tmp_path: Path, content: str) -> None:
    folder = add_job(tmp_path, "job", metrics=scores(0.5))
    (folder / ".hydra" / "overrides.yaml").write_text(content)

    page = write(tmp_path)

    assert "1 of 1 jobs done." in page.all_text()
    assert any("overrides.yaml: not" in text for _, text in page.texts)


def test_a_folder_without_jobs(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{folder}: holds no job"):
            read_jobs(folder)


@pytest.mark.parametrize(
    "jobs",
    [
        {"one": {"metrics": scores(0.5)}},
        {"one": {"failed": ""}, "two": {"failed": "no memory"}},
        {"one": {}, "two": {}},
        {"one": {"metrics": {}}, "two": {"metrics": {}}},
        {"one": {"metrics": scores(0.5, cam=None)}, "two": {"metrics": {"val/lpcam/recall": 0.5}}},
        {"one": {"metrics": scores(0.0, cam=0.0)}, "two": {"metrics": scores(0.0, cam=0.0)}},
    ],
    ids=["one job", "all failed", "all missing", "no metrics", "some metrics", "all zero"],
)
def test_whatever_there_is_makes_a_page(tmp_path: Path, jobs: dict[str, dict], capsys) -> None:
    for k, (name, how) in enumerate(jobs.items()):
        add_job(tmp_path, name, f"k={k}", **how)

    summary = write_summary(tmp_path, command="", dataset=None, split="val")

    page = Page(summary.page.read_text())
    rows = [row for row in page.rows if row[0] in jobs]
    assert len(rows) == len(jobs)
    scored = any("val/lpcam/miou" in how.get("metrics", {}) for how in jobs.values())
    assert ("so nothing is compared" in page.all_text()) == (not scored)
    print_summary(summary)
    assert f"of {len(jobs)} jobs done" in capsys.readouterr().out


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    for k in (4, 8):
        add_job(tmp_path, str(k), f"k={k}", metrics=scores(k / 10))
    page = write(tmp_path)
    text = (tmp_path / "sweep.html").read_text()

    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text.replace("url(#", "")
    assert not {"iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "figure")
    (figure,) = (tmp_path / "figures").iterdir()
    assert figure.name == "lines.png"
    with Image.open(figure) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    assert (tmp_path / "sweep.csv").read_text() == to_csv(Sweep(read_jobs(tmp_path), "val"))


def test_the_table_shows_the_best_job_first_and_the_best_of_each_column(tmp_path: Path) -> None:
    add_job(tmp_path, "low", "k=4", metrics=scores(0.5, cam=0.125), seconds={"total": 1.0})
    stages = {"total": 1200.5, "clustering": 0.0, "maps of val": 1200.0}
    add_job(tmp_path, "high", "k=8", metrics=scores(0.75, cam=0.5), seconds=stages)
    page = write(tmp_path)

    rows = [row for row in page.rows if row[0] in ("low", "high")]
    assert rows == [
        ["high", "8", "75.0", "+25.0", "", "50.0", "", "", "1,200.5", "maps of val 1,200.0"],
        ["low", "4", "50.0", "+37.5", "", "50.0", "", "", "1.0", "nothing"],
    ]
    bold = [text for tag, text in page.texts if tag == "b"]
    assert {"75.0", "+37.5", "1.0"} <= set(bold)
    assert not {"+25.0", "1,200.5"} & set(bold)


def test_stages_that_a_job_computed() -> None:
    seconds = {"total": 9.0, "features": 0.0, "clustering": 0.25, "maps of val": 7.0}

    assert computed(Job(Path("a"), (), "done", seconds=seconds)) == (
        "clustering 0.2, maps of val 7.0"
    )
    assert computed(Job(Path("a"), (), "done", seconds={"total": 9.0})) == "nothing"
    assert computed(Job(Path("a"))) == ""


def test_names_are_shown_and_never_obeyed(tmp_path: Path, capsys) -> None:
    values = [*NASTY, "[0.5,1.0]", "null", "a/b/ü", "[red]x[/red]"]
    for i, value in enumerate(values):
        metrics = scores(0.5 + i / 100) | {f"val/lpcam/iou/{name}": 0.5 for name in NASTY}
        add_job(tmp_path, f"job {i}", f"x={value}", f"+y.{NASTY[0]}={i}", metrics=metrics)
    add_job(tmp_path, "bad", "x=1", "+y=2", failed=NASTY[1])

    summary = write_summary(tmp_path, command=NASTY[0], dataset=None, split="val")

    page = Page(summary.page.read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    cells = {text for tag, text in page.texts if tag == "td"}
    assert cells >= set(values)
    assert ("pre", NASTY[0]) in page.texts
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["x"] for row in rows} == {*values, "1"}
    print_summary(summary)
    assert "[red]x[/red]" in capsys.readouterr().out


@given(st.lists(st.integers(), max_size=40), st.integers(2, 10))
def test_evenly_chosen_items_keep_order_and_ends(items: list[int], count: int) -> None:
    marked = list(enumerate(items))
    chosen = evenly(marked, count)

    assert len(chosen) == min(len(items), count)
    assert chosen == sorted(set(chosen))
    assert not items or (chosen[0], chosen[-1]) == (marked[0], marked[-1])
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.lists(st.text("ab/", max_size=12), max_size=4))
def test_short_texts_stay_distinct(texts: list[str]) -> None:
    short = shorten(texts, 8)
    assert len(set(short)) == len(set(texts))
    assert all(s == t for s, t in zip(short, texts, strict=True) if len(t) <= 8)


SIZE = (20, 30)


@pytest.fixture
def pictures(tmp_path: Path) -> Folder:
    """Four pictures of two classes; in each true mask the left half is the class."""
    root = tmp_path / "data"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("bird\nfish\n")
    lines = ["id,split,labels"]
    for i, label in enumerate([0, 0, 0, 1]):
        lines.append(f"p{i},val,{('bird', 'fish')[label]}")
        Image.new("RGB", SIZE[::-1], "white").save(root / "images" / f"p{i}.png")
        save_mask(root / "masks" / f"p{i}.png", half(label + 1))
    (root / "labels.csv").write_text("\n".join([*lines, "t,train,bird"]))
    Image.new("RGB", SIZE[::-1], "white").save(root / "images" / "t.png")
    return Folder(root, map_splits=("val",))


def half(label: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[:, : SIZE[1] // 2] = label
    return mask


def add_masks(job: Path, label: int) -> None:
    """The label covers all of every picture."""
    (job / "masks").mkdir()
    for i in range(4):
        save_mask(job / "masks" / f"p{i}.png", np.full(SIZE, label, np.uint8))


def decoded(attributes: Mapping[str, str]) -> np.ndarray:
    data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_the_gallery_shows_each_jobs_masks_beside_the_truth(tmp_path, pictures: Folder) -> None:
    sweep = tmp_path / "sweep"
    for k, label in ((4, 1), (8, 0)):
        add_masks(add_job(sweep, f"j{k}", f"k={k}", metrics=scores(k / 100)), label)

    page = write(sweep, dataset=pictures)

    found = {a["alt"]: decoded(a) for tag, a in page.tags if tag == "img"}
    red = {alt: (p[..., 0] - p[..., 2] > 60).mean() for alt, p in found.items()}
    assert red["Picture p0"] == 0
    assert red["True mask of p0"] == pytest.approx(0.5, abs=0.05)
    assert red["Mask of p0 with k=4"] == 1
    assert red["Mask of p0 with k=8"] == 0
    (row,) = [row for row in page.rows if row[0] == "p0bird"]
    assert row[-2:] == ["50.0", "0.0"]
    assert (sweep / "figures" / "gallery.png").is_file()


def test_a_mask_that_is_missing_damaged_or_of_another_size_is_left_out(
    tmp_path: Path, pictures: Folder
) -> None:
    job = add_job(tmp_path, "job", metrics={})
    add_masks(job, 1)
    (job / "masks" / "p1.png").unlink()
    (job / "masks" / "p2.png").write_bytes(b"no picture")
    save_mask(job / "masks" / "p3.png", np.zeros((3, 3), np.uint8))

    rows = make_rows(pictures, pictures.pictures("val"), read_jobs(tmp_path))

    assert [row.masks[0] is not None for row in rows] == [True, False, False, False]
    assert rows[0].masks[0][1] == 0.5


def test_the_gallery_shows_pictures_that_have_masks(tmp_path: Path, pictures: Folder) -> None:
    """With save=shown that are a few."""
    sweep = tmp_path / "sweep"
    for override in ("k=1", "k=2"):
        job = add_job(sweep, override, override, metrics={})
        add_masks(job, 1)
        for name in ("p0", "p2"):
            (job / "masks" / f"{name}.png").unlink()

    text = write(sweep, dataset=pictures).all_text()

    assert [name in text for name in ("p0", "p1", "p2", "p3")] == [False, True, False, True]


@pytest.mark.parametrize(
    ("overrides", "settings", "reason"),
    [
        (["k=1", "k=2"], {"gallery": ["p9"]}, "no picture p9 in the split that is shown"),
        (["dataset.seed=1", "dataset.seed=2"], {}, "dataset.seed differs"),
        (["k=1", "k=2"], {"dataset": None}, "No data set was given"),
    ],
)
def test_the_page_says_why_there_is_no_gallery(
    tmp_path: Path, pictures: Folder, overrides, settings, reason: str
) -> None:
    sweep = tmp_path / "sweep"
    for override in overrides:
        add_masks(add_job(sweep, override, override, metrics={}), 1)

    page = write(sweep, **({"dataset": pictures} | settings))

    assert reason in page.all_text()
    assert "img" not in {tag for tag, _ in page.tags}


def test_the_gallery_has_few_settings_and_the_best_among_them(tmp_path: Path) -> None:
    for k in range(1, 31):
        for seed in (0, 1):
            miou = 0.9 if k == 17 else 0.5
            job = add_job(tmp_path, f"{k}-{seed}", f"k={k}", f"seed={seed}", metrics=scores(miou))
            (job / "masks").mkdir()
    sweep = Sweep(read_jobs(tmp_path), "val")

    chosen = choose_jobs(sweep)

    assert sweep.best in chosen
    assert [job.values["seed"] for job in chosen] == ["0"] * 14
    ks = [int(job.values["k"]) for job in chosen]
    assert ks == sorted(ks)
    assert (ks[0], ks[-1]) == (1, 30)


def test_a_stopped_sweep_is_summarised_by_hand(tmp_path: Path, pictures: Folder, capsys) -> None:
    sweep = tmp_path / "sweep"
    job = add_job(sweep, "job", "k=4", metrics=scores(0.5))
    add_masks(job, 1)
    add_job(sweep, "stopped", "k=8", failed="no memory")
    (job / "config.yaml").write_text(
        "dataset:\n  _target_: lpcam.data.folder.Folder\n"
        f"  root: {pictures.root}\n  map_splits: [val]\n"
    )
    (sweep / "multirun.yaml").write_text("hydra: {overrides: {task: ['k=4,8', 'x=a b']}}")

    assert main(["summary", str(sweep)]) == 0

    printed = capsys.readouterr()
    assert "failed: stopped (k=8): no memory" in printed.out
    assert "Best: python infer.py k=4" in printed.out
    assert printed.err == ""
    page = Page((sweep / "sweep.html").read_text())
    assert ("pre", "python infer.py -m k=4,8 'x=a b'") in page.texts
    assert "Mask of p3 with k=4" in {a.get("alt") for _, a in page.tags}


def test_by_hand_without_a_config_or_a_sweep(tmp_path: Path, capsys) -> None:
    add_job(tmp_path, "job", "k=4", metrics=scores(0.5))
    assert main(["summary", str(tmp_path)]) == 0
    assert "no job has a config.yaml" in capsys.readouterr().err
    page = Page((tmp_path / "sweep.html").read_text())
    assert ("pre", f"lpcam summary {tmp_path}") in page.texts

    assert main(["summary", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: holds no job" in capsys.readouterr().err


def test_words_without_any_score() -> None:
    sweep = Sweep([Job(Path("a"), ("k=1",)), Job(Path("b"), ("k=2",))], "val")

    assert best_in_words(sweep) == ""
    assert no_help(sweep) == []
    assert to_csv(sweep).splitlines() == ["folder,status,k,seconds", "a,missing,1,", "b,missing,2,"]
    assert command_of(sweep.jobs[0]) == "python infer.py k=1"
