"""How seconds and memory grow with pictures and with classes: all stages but the network's part.

A tiny network stands for the backbone, and few JPEG files under many names for the pictures, so
that thousands of them pass through features, clustering, selection, maps and scores in seconds.
Each number is of a process of its own. Pictures to cluster are drawn, as the paper does on COCO:
all of a class's features are in memory at a time, and nothing else may grow.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.benchmarks.harness import Method, Options, Row, in_child, peak, section, target
from experiments.benchmarks.whole_pass import trainer_maker
from lpcam.data.folder import Folder
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier
from lpcam.prototypes.centers import Clustering
from lpcam.prototypes.local_features import Draw
from lpcam.prototypes.maps import MapSetting, lpcam_setting
from lpcam.prototypes.selection import Selection, select
from lpcam.stages.centers import centers, prototype_pictures
from lpcam.stages.features import features
from lpcam.stages.maps import Inference, maps
from lpcam.stages.scores import scores

BACKBONE = "test_efficientnet.r160_in1k"
PICTURES, CLASSES = (500, 1581, 5000), (5, 20, 80)  # equal factors
FILES, DRAWN = 50, 10
SIZE = (128, 96)


def tree(folder: Path, pictures: int, classes: int) -> Folder:
    """A data set of a folder, whose pictures are few files under many names."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "once"):
        (folder / name).mkdir()
    shape = SIZE[::-1]
    lines = ["id,split,labels"]
    for index in range(pictures):
        # Each file has the labels of its turn, so that masks and labels agree.
        turn = index % max(FILES, classes)
        first, second = turn % classes, (turn + 1) % classes
        files = {
            "images": folder / "once" / f"{turn}.jpg",
            "masks": folder / "once" / f"{turn}.png",
        }
        if not files["images"].exists():
            small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
            small.resize(SIZE).save(files["images"])
            mask = rng.choice([0, first + 1, second + 1], shape).astype(np.uint8)
            Image.fromarray(mask).save(files["masks"])
        for name, file in files.items():
            os.link(file, folder / name / f"{index}{file.suffix}")
        lines.append(f"{index},train,class{first} class{second}")
    (folder / "classes.txt").write_text("".join(f"class{c}\n" for c in range(classes)))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return Folder(folder, map_splits=("train",), val_split="train")


def stages(options: Options, pictures: int, classes: int) -> dict[str, Method]:
    """All stages of a run one after the other; gives the most memory that was held."""
    folder = tempfile.TemporaryDirectory()
    dataset = tree(Path(folder.name), pictures, classes)
    host = Classifier(build_backbone(BACKBONE, None), classes).eval()
    make_trainer = trainer_maker(options, Path(folder.name))

    def run() -> Method:
        with folder:
            store = Path(folder.name) / "store"
            chosen_pictures, chosen = prototype_pictures(dataset, Draw(DRAWN))
            local = features(store, make_trainer, host, chosen_pictures, local=True, num_workers=0)
            clustering = Clustering(k=4, allow_missing=True, max_iter=10)
            _, found = centers(store, local, host, dataset, clustering, chosen)
            prototypes = select(found, host, dataset.classes, Selection(class_score=0))
            wanted = {"cam": MapSetting(), "lpcam": lpcam_setting(prototypes, "both")}
            made = maps(
                store, make_trainer, host, dataset.pictures("train"), wanted,
                Inference((1.0,), flip=False), num_workers=0,
            )  # fmt: skip
            scores(store, {name: {"train": stage} for name, stage in made.items()}, dataset)
        return lambda: {"resident": peak(options) / 1e6}

    return {"run": run}


def table(options: Options) -> list[Row]:
    """Seconds and memory of three numbers of pictures, and of three numbers of classes."""
    if options.quick:
        return [_along("pictures", [(20, 2), (40, 2)], options)]
    return [
        _along("pictures", [(count, 20) for count in PICTURES], options),
        _along("classes", [(PICTURES[0], count) for count in CLASSES], options),
    ]


def _along(what: str, sizes: list[tuple[int, int]], options: Options) -> Row:
    rows: list[Row] = []
    for pictures, classes in sizes:
        found = in_child("scale:stages", options, "run", pictures=pictures, classes=classes)
        rows.append({"name": f"{pictures} pictures, {classes} classes", **found})
    first, last = rows[0], rows[-1]
    place = int(what == "classes")
    more = sizes[-1][place] / sizes[0][place]
    targets = [
        target(
            f"seconds of {more:g} times as many {what} / {more:g} times the seconds",
            last["seconds"] / first["seconds"] / more, most=1.1,
        )
    ]  # fmt: skip
    if what == "pictures":
        grown = last["resident"] / first["resident"]
        targets.append(target("memory of most / of fewest pictures", grown, most=1.1))
    text = (
        f"Features, clustering of {DRAWN} pictures a class, selection, CAM and LPCAM, scores; "
        f"{BACKBONE}, {SIZE[0]}x{SIZE[1]} pixels, two classes a picture."
    )
    return section(f"Growth with {what}", text, rows, targets=targets, value="seconds")
