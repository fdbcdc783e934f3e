"""The report of one inference run: one HTML file that needs nothing else, and its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from lpcam.data.dataset import Picture, SegmentationDataset
from lpcam.reporting.figures import (
    COLOURS,
    draw_classes,
    draw_confusion,
    draw_curves,
    save_png,
    svg,
)
from lpcam.reporting.gallery import (
    Example,
    Instances,
    caption,
    choose,
    compare,
    draw_gallery,
    heat_scale,
    panels,
)
from lpcam.reporting.mistakes import KINDS, class_rows, largest_confusions
from lpcam.reporting.page import class_colours, data_uri, render
from lpcam.reporting.patches import PrototypeView, crop_all, draw_prototypes
from lpcam.reporting.scores import COLUMNS, Method, in_words, score_rows
from lpcam.storage.files import write_atomically

STANDALONE_ROWS = 4


def write_report(
    path: Path,
    *,
    title: str,
    command: str,
    config: str,
    dataset: SegmentationDataset,
    splits: Mapping[str, Sequence[Picture]],
    methods: Sequence[Method],
    threshold: float,
    prototypes: Sequence[PrototypeView],
    seconds: Mapping[str, float],
    gallery_split: str,
    gallery_size: int = 6,
    instances: Instances | None = None,
) -> None:
    """Write the report and, beside it, ``figures/*.png``.

    The figures are ``threshold_curves``, ``per_class``, ``confusion``, ``gallery`` and
    ``prototypes``; one for which there is nothing to draw is left out, such as the first three
    without any mask.

    Args:
        path: The report.
        title: Its heading.
        command: What made this run.
        config: Its whole config, YAML.
        dataset: Names the classes and reads the true masks.
        splits: The pictures of each split.
        methods: The baseline, the method compared with it, and up to three others.
        threshold: The configured background score.
        prototypes: What is known of each cluster centre.
        seconds: How long each stage took.
        gallery_split: The split whose pictures are shown.
        gallery_size: At most so many gains, and so many losses.
        instances: Gives the instances found in a picture, if they are wanted.
    """
    classes, pair, pictures = dataset.classes, methods[:2], splits[gallery_split]
    scored = [split for split in splits if all(split in method.results for method in methods)]
    examples = compare(dataset, pictures, pair, gallery_split) if gallery_split in scored else []
    chosen = choose(examples, gallery_size)
    if not any(chosen.values()):
        chosen = {"Pictures": [Example(picture) for picture in pictures[:gallery_size]]}
    gallery = {
        heading: [
            (example, panels(dataset, example.picture, pair, gallery_split, threshold, instances))
            for example in group
        ]
        for heading, group in chosen.items()
    }
    patches = crop_all(prototypes)

    drawings = {}
    if scored:
        drawings["threshold_curves"] = draw_curves(methods, scored, threshold)
        drawings["per_class"] = draw_classes(methods, scored, classes)
        drawings["confusion"] = draw_confusion(pair, scored[-1], classes)
    heading, group = next(((h, g) for h, g in gallery.items() if g), ("", []))
    if group:
        rows = [(caption(e, classes, pair), shown) for e, shown in group[:STANDALONE_ROWS]]
        drawings["gallery"] = draw_gallery(f"{heading}, {gallery_split}", rows)
    if prototypes:
        drawings["prototypes"] = draw_prototypes(prototypes, patches)
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawings.items():
        save_png(figure, folder / f"{name}.png")

    page = render(
        Path(__file__).with_name("report.html.j2"),
        title=title,
        command=command,
        config=config,
        splits=splits,
        classes=classes,
        methods=methods,
        threshold=threshold,
        columns=[heading.format(threshold) for heading, *_ in COLUMNS.values()],
        scored={
            split: {
                "words": in_words(pair, split, classes),
                "rows": score_rows(methods, split, threshold),
                "curves": Markup(svg(draw_curves(methods, [split], threshold))),
                "bars": Markup(svg(draw_classes(methods, [split], classes))),
                "mistakes": class_rows(pair, split, classes, splits[split]),
                "confusions": largest_confusions(pair[1], split, classes),
                "confusion": Markup(svg(draw_confusion(pair, split, classes))),
            }
            for split in scored
        },
        kinds=KINDS,
        gallery=gallery,
        gallery_split=gallery_split,
        examples=examples,
        prototypes=_by_class(prototypes, patches),
        seconds=seconds,
        skipped=dataset.skipped,
        method_colours=COLOURS,
        class_colours=class_colours(len(classes)),
        heat_scale=heat_scale(),
        data_uri=data_uri,
    )
    write_atomically(path, page)


def _by_class(
    views: Sequence[PrototypeView], patches: Sequence[Sequence[Image.Image]]
) -> dict[str, dict[str, list[tuple[PrototypeView, Sequence[Image.Image]]]]]:
    """Prototypes by class, then ``class``, ``context`` and ``dropped``, the largest first."""
    found: dict[str, dict[str, list[tuple[PrototypeView, Sequence[Image.Image]]]]] = {
        view.class_name: {"class": [], "context": [], "dropped": []} for view in views
    }
    for view, images in sorted(zip(views, patches, strict=True), key=lambda pair: -pair[0].count):
        found[view.class_name][view.side if view.kept else "dropped"].append((view, images))
    return found
