"""The report of a segmentation run: one HTML file that needs nothing else, and its figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset, open_picture
from lpcam.reporting.figures import COLOURS, draw_confusion, save_png, svg
from lpcam.reporting.gallery import PANEL_SIDE, draw_gallery, foreground_iou
from lpcam.reporting.mistakes import largest_confusions
from lpcam.reporting.page import class_colours, data_uri, render
from lpcam.reporting.scores import COLUMNS, MaskMethod, score_rows
from lpcam.storage.files import write_atomically
from lpcam.visualize import mask_overlay, to_grey, to_image

SHOWN = ("miou", "gain", "precision", "recall", "fp", "fn")
STANDALONE_ROWS = 4


def write_segmentation_report(
    path: Path,
    *,
    title: str,
    command: str,
    config: str,
    dataset: SegmentationDataset,
    splits: Mapping[str, Sequence[Picture]],
    methods: Sequence[MaskMethod],
    shown: Sequence[Picture],
    seconds: Mapping[str, float],
) -> None:
    """Write the report and, beside it, ``figures/gallery.png`` and ``figures/confusion.png``.

    Args:
        path: The report.
        title: Its heading.
        command: What made this run.
        config: Its whole config, YAML.
        dataset: Names the classes and reads the true masks.
        splits: The pictures of each split; those of the last are shown.
        methods: The masks that were learnt from, if they are known, and the network's.
        shown: The pictures to show.
        seconds: How long each stage took.
    """
    classes, last = dataset.classes, list(splits)[-1]
    rows = [(picture, *_panels(dataset, picture, methods, last)) for picture in shown]
    figures = path.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    drawn = [(caption, panels) for _, caption, panels in rows[:STANDALONE_ROWS]]
    save_png(draw_gallery(f"Masks, {last}", drawn), figures / "gallery.png")
    if last in methods[-1].results:
        save_png(draw_confusion(methods[-1:], last, classes), figures / "confusion.png")
    scored = {}
    for split in splits:
        found = [method for method in methods if split in method.results]
        if found:
            cells = [
                [cell for key, cell in zip(COLUMNS, row, strict=True) if key in SHOWN]
                for row in score_rows(found, split, math.nan)
            ]
            ious = [100 * method.results[split].iou[0] for method in found]
            scored[split] = {
                "rows": list(zip(found, cells, strict=True)),
                "classes": [
                    (name, ["" if math.isnan(iou[c]) else f"{iou[c]:.1f}" for iou in ious])
                    for c, name in enumerate(("background", *classes))
                ],
                "confusions": largest_confusions(found[-1], split, classes),
                "confusion": Markup(svg(draw_confusion(found[-1:], split, classes))),
            }
    page = render(
        Path(__file__).with_name("segmentation.html.j2"),
        title=title,
        command=command,
        config=config,
        splits=splits,
        last=last,
        methods=methods,
        columns=[COLUMNS[key][0] for key in SHOWN],
        scored=scored,
        gallery=rows,
        seconds=seconds,
        class_names=classes,
        method_colours=dict(zip((m.name for m in methods), COLOURS, strict=False)),
        class_colours=class_colours(len(classes)),
        data_uri=data_uri,
    )
    write_atomically(path, page)


def _panels(
    dataset: SegmentationDataset, picture: Picture, methods: Sequence[MaskMethod], split: str
) -> tuple[str, list[tuple[str, Image.Image]]]:
    """A picture, its true mask and each method's, at most 320 pixels a side, and their IoU."""
    image = open_picture(picture.path)
    grey, truth = to_grey(image), dataset.mask(picture)
    shown = [("picture", image)]
    if truth is not None:
        shown.append(("truth", to_image(mask_overlay(grey, truth))))
    ious = []
    for method in methods:
        if split not in method.maps:
            continue
        mask = method.mask(split, picture, math.nan)
        shown.append((method.name, to_image(mask_overlay(grey, mask))))
        iou = math.nan if truth is None else foreground_iou(truth, mask)
        if not math.isnan(iou):
            ious.append(f"{method.name} {100 * iou:.1f}")
    for _, panel in shown:
        panel.thumbnail((PANEL_SIDE, PANEL_SIDE))
    return f"{picture.id}: IoU {', '.join(ious)}" if ious else picture.id, shown
