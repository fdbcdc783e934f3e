import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.evaluation import SegmentationScore
from lpcam.reporting.report import Method, PrototypeView, write_report
from lpcam.seeds.palette import save_mask
from lpcam.seeds.record import SeedRecord, grid_size, read_seed, save_seed
from lpcam.storage.records import Records
from tests.pages import NASTY, Page

SIZE = (40, 56)


class TinyDataset(SegmentationDataset):
    """Pictures that a test adds one by one, with constant maps of two methods."""

    def __init__(self, root: Path, classes: list[str]) -> None:
        super().__init__(root, classes)
        self.splits: dict[str, list[Picture]] = {}
        self.rng = np.random.default_rng(0)

    def pictures(self, split: str) -> list[Picture]:
        return self.splits[split]

    def add(
        self,
        split: str,
        name: str,
        labels: tuple[int, ...],
        *,
        share: float | None,
        cam: float = 1.0,
        lpcam: float = 1.0,
    ) -> None:
        """Add a picture, ``share`` of which is its first class, and constant maps of it."""
        number = sum(map(len, self.splits.values()))
        path = self.root / f"{number}.jpg"
        Image.fromarray(self.rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(path)
        mask_path = None
        if share is not None:
            mask = np.zeros(SIZE, np.uint8)
            mask[:, : round(share * SIZE[1])] = labels[0] + 1 if labels else 0
            mask_path = self.root / f"{number}.png"
            save_mask(mask_path, mask)
        self.splits.setdefault(split, []).append(Picture(name, path, labels, mask_path))
        for method, value in (("cam", cam), ("lpcam", lpcam)):
            folder = self.root / method / split
            folder.mkdir(parents=True, exist_ok=True)
            maps = np.full((len(labels), *grid_size(SIZE)), value)
            save_seed(folder / f"{name}.npz", SeedRecord(np.array(labels, np.int64), maps, SIZE))

    def method(self, name: str, folder: str) -> Method:
        results, maps = {}, {}
        for split, pictures in self.splits.items():
            maps[split] = Records(self.root / folder / split)
            score = SegmentationScore(len(self.classes), 10)
            for picture in pictures:
                mask = self.mask(picture)
                if mask is not None:
                    seed = read_seed(maps[split], picture.id)
                    score.update(seed.full_size(), seed.keys, mask)
            if score.histogram.any():
                results[split] = score.compute()
        return Method(name, results, maps)


@dataclass
class Run:
    """A data set and what the report of it needs."""

    dataset: TinyDataset
    path: Path
    prototypes: list[PrototypeView] = field(default_factory=list)

    def write(self, **changes: object) -> Page:
        self.methods = [
            self.dataset.method("CAM", "cam"),
            self.dataset.method("LPCAM", "lpcam"),
            self.dataset.method("LPCAM without context", "lpcam"),
        ]
        settings = {
            "title": "A run",
            "command": "python infer.py dataset=tiny",
            "config": "seed: 0\n",
            "dataset": self.dataset,
            "splits": self.dataset.splits,
            "methods": self.methods,
            "threshold": 0.3,
            "prototypes": self.prototypes,
            "seconds": {"features": 1.25},
            "gallery_split": "val",
        }
        write_report(self.path, **(settings | changes))
        return Page(self.path.read_text())

    def add_prototypes(self) -> None:
        pictures = self.dataset.pictures("train")
        for c, name in enumerate(self.dataset.classes):
            for index, (side, kept) in enumerate(
                [("class", True), ("class", False), ("context", True), ("context", False)]
            ):
                patches = [(picture, (0.1, 0.9)) for picture in pictures[:2]]
                view = PrototypeView(name, side, index, 0.875, 100 + 10 * c + index, kept, patches)
                self.prototypes.append(view)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Pictures that gain, lose and stay, some of them by the same amount.

    A map of ones predicts the class everywhere, so IoU is the class's share; one of zeros predicts
    it nowhere, so IoU is zero.
    """
    dataset = TinyDataset(tmp_path, ["bird", "fish"])
    shares = {"a": 0.25, "b": 0.75, "d": 0.5, "c": 0.5}
    for name, share in shares.items():
        dataset.add("val", f"gain {name}", (0,), share=share, cam=0)
    dataset.add("val", "loss small", (1,), share=0.25, lpcam=0)
    dataset.add("val", "loss large", (1,), share=0.5, lpcam=0)
    dataset.add("val", "same", (0,), share=1.0)
    dataset.add("train", "train 1", (0,), share=1.0, cam=0.25, lpcam=0.75)
    dataset.add("train", "train 2", (1,), share=0.5, cam=0.25, lpcam=0.75)
    made = Run(dataset, tmp_path / "run" / "report.html")
    made.path.parent.mkdir()
    return made


def test_the_page_is_whole_and_loads_nothing(run: Run) -> None:
    run.add_prototypes()
    page = run.write()
    text = run.path.read_text()

    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed"} & set(tags)
    assert page.tags[0] == ("html", {"lang": "en"})
    sections = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name, "#")
            assert value.startswith("data:") or value == "#" or value[1:] in sections
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["alt"]
            data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
            assert Image.open(io.BytesIO(data)).format == "JPEG"


def test_the_table_holds_the_scores(run: Run) -> None:
    page = run.write()
    rows = [row for row in page.rows if row[0] in ("CAM", "LPCAM", "LPCAM without context")]

    assert len(rows) == 2 * 3
    for row, (split, method) in zip(
        rows, [(s, m) for s in ("val", "train") for m in run.methods], strict=True
    ):
        metrics = method.results[split].metrics(run.dataset.classes, 0.3)
        baseline = run.methods[0].results[split]
        gain = metrics["miou"] - baseline.miou[baseline.best]
        assert row == [
            method.name,
            f"{100 * metrics['miou']:.1f}",
            "n/a" if method.name == "CAM" else f"{100 * gain:+.1f}",
            f"{metrics['best_threshold']:.2f}",
            f"{100 * metrics['miou_at_threshold']:.1f}",
            f"{100 * metrics['precision']:.1f}",
            f"{100 * metrics['recall']:.1f}",
            f"{100 * metrics['fp']:.1f}",
            f"{100 * metrics['fn']:.1f}",
            f"{metrics['threshold_width']:.2f}",
        ]


def test_the_gallery_shows_gains_and_losses(run: Run) -> None:
    page = run.write(gallery_size=3)
    assert all(run.methods[i].threshold("val", 1.0) < 1 for i in (0, 1))

    names = {picture.id for picture in run.dataset.pictures("val")}
    shown = [t for _, t in page.texts if t in names | {"Largest gains", "Worst losses"}]
    assert shown == [
        *("Largest gains", "gain b", "gain c", "gain d"),
        *("Worst losses", "loss large", "loss small"),
    ]
    at = [text for _, text in page.texts]
    line = at[at.index("gain b") - 3 : at.index("gain b")]
    assert line == ["CAM 0.0", "LPCAM 75.0", "+75.0 points IoU"]
    panels = at[at.index("gain b") + 1 :][:6]
    assert panels == ["picture", "CAM", "LPCAM", "truth", "CAM mask", "LPCAM mask"]
    assert "Of 7 pictures with objects, 4 gain and 2 lose with LPCAM." in at


def test_each_panel_shows_what_its_title_says(run: Run) -> None:
    page = run.write()

    images = [a for tag, a in page.tags if tag == "img" and a["alt"].endswith(" of gain b")]
    red, blue = {}, {}
    for attributes in images:
        data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        assert pixels.shape == (*SIZE, 3)
        name = attributes["alt"].removesuffix(" of gain b")
        # The first class is dark red in the palette; the paled picture is grey.
        red[name] = (pixels[..., 0] - pixels[..., 2] > 60).mean()
        blue[name] = pixels[..., 2].mean()
    assert red["truth"] == pytest.approx(0.75, abs=0.03)
    assert red["CAM mask"] == pytest.approx(0, abs=0.03)
    assert red["LPCAM mask"] == pytest.approx(1, abs=0.03)
    # The map of zeros leaves the picture grey and dark, the map of ones turns it to pale yellow.
    assert blue["LPCAM"] > blue["CAM"] + 30


def test_the_figures_are_pictures_of_something(run: Run) -> None:
    run.add_prototypes()
    run.write()

    figures = sorted((run.path.parent / "figures").iterdir())
    assert [figure.name for figure in figures] == [
        "confusion.png",
        "gallery.png",
        "per_class.png",
        "prototypes.png",
        "threshold_curves.png",
    ]
    for figure in figures:
        with Image.open(figure) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 100


def test_prototypes_stand_by_their_class_and_side(run: Run) -> None:
    run.add_prototypes()
    page = run.write()

    at = [text for _, text in page.texts]
    start = at.index("bird", at.index("What each prototype looks at"))
    assert at[start : start + 11] == [
        *("bird", "1 class prototype", "class 0", "p 0.88, 100 features"),
        *("1 context prototype", "context 2", "p 0.88, 102 features"),
        "2 dropped clusters of bird",
        *("context 3", "p 0.88, 103 features", "class 1"),
    ]
    assert "fish" in at[start + 11 :]
    patches = [a for tag, a in page.tags if tag == "img" and a["alt"].startswith("Patch")]
    assert len(patches) == 2 * 4 * 2
    assert patches[0]["title"] == "train 1"


def test_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, NASTY)
    for index in range(len(NASTY)):
        dataset.add("train", f"odd & <i>{index}#?%ü", (index,), share=0.5, cam=0.25)
        dataset.add("val", f"odder & <i>{index}#?%ü $x^$", (index,), share=0.5, cam=0)
    run = Run(dataset, tmp_path / "report.html")
    run.add_prototypes()

    page = run.write(title=NASTY[0], command=NASTY[1], config=f"a: {NASTY[0]}\n")

    assert "script" not in {tag for tag, _ in page.tags}
    assert all(a["src"].startswith("data:image/") for tag, a in page.tags if tag == "img")
    for name in NASTY:
        # In a chip, in the bar chart, and as a heading.
        assert {"span", "text", "h3"} <= {tag for tag, text in page.texts if text == name}
    assert ("h1", NASTY[0]) in page.texts
    assert ("pre", NASTY[1]) in page.texts
    assert ("span", "odder & <i>0#?%ü $x^$") in page.texts
    assert "odd & <i>0#?%ü" in {a.get("title") for _, a in page.tags}


def test_without_masks_there_are_pictures_but_no_scores(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, ["bird", "fish"])
    dataset.add("train", "labelled", (0,), share=0.5)
    dataset.add("val", "no mask", (0, 1), share=None)
    dataset.add("val", "no class", (), share=None)
    run = Run(dataset, tmp_path / "report.html")

    page = run.write()

    text = page.all_text()
    assert "train, 1 picture\n" in text
    assert "val, 2 pictures" not in text
    assert {"no mask", "no class"} <= {text for _, text in page.texts}
    assert "truth" not in [text for tag, text in page.texts if tag == "figcaption"]
    assert (tmp_path / "figures" / "gallery.png").is_file()

    del dataset.splits["train"]
    page = run.write()

    assert "The data set has no true masks, so nothing is scored." in page.all_text()


def test_pictures_without_mask_or_class_are_left_out_of_the_comparison(run: Run) -> None:
    run.dataset.add("val", "no mask", (0,), share=None, cam=0)
    run.dataset.add("val", "no class", (), share=0.5, cam=0)

    page = run.write()

    assert "Of 7 pictures with objects, 4 gain and 2 lose with LPCAM." in page.all_text()


def test_where_nothing_differs_the_first_pictures_are_shown(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path, ["bird", "fish"])
    dataset.add("val", "no mask", (0,), share=None)
    dataset.add("val", "same", (0,), share=0.5)
    run = Run(dataset, tmp_path / "report.html")

    page = run.write()

    assert {"Pictures", "no mask", "same"} <= {text for _, text in page.texts}
    assert "LPCAM has the same mIoU as CAM" in page.all_text()


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    run.write()
    first = run.path.read_bytes()
    run.write()

    assert run.path.read_bytes() == first
