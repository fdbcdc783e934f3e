# python experiments/predicted_labels.py FOLDER experiments=voc_animals dataset.root=~/VOC2012
"""A data set whose val has the labels that the classifier predicts: what true labels are worth.

Takes the overrides of ``infer.py``, after its training, and writes the layout of dataset=folder.
Train keeps its labels. A picture of val gets the classes of a probability above 0.5, at least the
likeliest, from one view. Then, with the file that the last line names:
``python infer.py dataset=folder dataset.root=FOLDER ckpt=FILE "dataset.map_splits=[val]"``.
"""

import csv
import shutil
import sys
from pathlib import Path

import torch
from rich.progress import track

from lpcam.data.dataset import Picture
from lpcam.data.loaders import normalized, view_loader
from lpcam.programs.compose import infer_config
from lpcam.programs.setup import trained
from lpcam.seeds.palette import save_mask


@torch.no_grad()
def main(folder: Path, overrides: list[str]) -> None:
    """Write the data set; print how good the labels are."""
    found = trained(infer_config(overrides, "outputs/labels"), overrides)
    dataset, host = found.dataset, found.host.for_inference()
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in dataset.classes))
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "split", "labels"])

        def add(picture: Picture, split: str, labels: list[int]) -> None:
            shutil.copy2(picture.path, folder / "images")  # with its time, by which it is known
            mask = dataset.mask(picture)
            if mask is not None:
                save_mask(folder / "masks" / f"{picture.id}.png", mask)
            rows.writerow([picture.id, split, " ".join(dataset.classes[c] for c in labels)])

        for picture in dataset.pictures(dataset.train_split):
            add(picture, "train", list(picture.labels or ()))
        pictures = dataset.pictures(dataset.val_split)
        loader = view_loader(pictures, len(dataset.classes), scales=[1.0], flip=False)
        right = wrong = missed = 0
        both = zip(pictures, loader, strict=True)
        for picture, batch in track(both, "Labels", total=len(pictures)):
            (image,) = normalized(batch, host.backbone.mean, host.backbone.std)["views"]
            scores = host.score(host.backbone(image).mean((2, 3)))[0]
            chosen = {int(scores.argmax()), *(scores > 0).nonzero()[:, 0].tolist()}
            add(picture, "val", sorted(chosen))
            true = set(picture.labels or ())
            right, wrong = right + len(chosen & true), wrong + len(chosen - true)
            missed += len(true - chosen)
    print(f"{right} labels right, {wrong} wrong, {missed} missed; ckpt={found.checkpoint}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
