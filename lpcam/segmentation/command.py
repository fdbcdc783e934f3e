"""``lpcam segment``: pictures in, masks out.

Imports nothing heavy until it is needed, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
from pathlib import Path
from typing import Any

from lpcam.errors import InputError


def add_command(commands: Any) -> None:
    """Add the command to a parser's subparsers."""
    text = "label the pixels of pictures with a trained segmentation network"
    command = commands.add_parser("segment", help=text)
    command.set_defaults(run=segment)
    command.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    text = "network.safetensors of a run of infer.py task=segmentation"
    command.add_argument("--network", required=True, type=Path, help=text)
    command.add_argument("--output", default="masks", type=Path, help="folder of the masks")
    command.add_argument("--overlays", action="store_true", help="write <id>-overlay.png as well")
    text = "shrink longer sides to so many px"
    command.add_argument("--side", default=640, type=int, help=text)
    text = "factors on that size"
    command.add_argument("--scales", nargs="+", default=[0.75, 1.0, 1.25], type=float, help=text)
    text = "power of a class's mean in the picture that its pixels are weighed by"
    command.add_argument("--image-prior", default=2.0, type=float, help=text)
    command.add_argument("--crf", metavar="NAME", help="dense CRF, such as deeplab")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def segment(options: argparse.Namespace) -> None:
    """Write ``<picture>.png`` for every picture, a palette PNG: 0 background, class index + 1.

    Args:
        options: The parsed command line.

    Raises:
        InputError: A file cannot be read, or two masks would have the same name.
    """
    import numpy as np
    import torch

    from lpcam.data.dataset import open_picture
    from lpcam.data.transforms import normalize, rescale
    from lpcam.refiners.crf import crf_parameters, dense_crf
    from lpcam.seeds.palette import save_mask
    from lpcam.segmentation.file import load_network
    from lpcam.segmentation.predict import check_crf
    from lpcam.segmentation.segmenter import Testing, probabilities
    from lpcam.settings import make
    from lpcam.visualize import mask_overlay, to_grey, to_image

    given = {"scales": options.scales, "crf": options.crf, "image_prior": options.image_prior}
    testing = make(Testing, {"flip": True, "merge": "mean", **given}, _option)
    check_crf(testing.crf, "--crf", "no --crf")
    names = [path.stem for path in options.pictures]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{options.output / twice}.png: two pictures of that name; rename one")
    found = load_network(options.network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = found.network.to(device)
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.pictures:
        image = open_picture(path)
        shrunk = rescale(image, min(1, options.side / max(image.size)))
        views = [
            normalize(rescale(shrunk, scale), network.mean, network.std)[None].to(device)
            for scale in testing.scales
        ]
        size = (image.height, image.width)
        with torch.inference_mode():
            scores = probabilities(
                network,
                views,
                size,
                flip=testing.flip,
                merge=testing.merge,
                image_prior=testing.image_prior,
            )
        labels = scores[0].cpu()
        if testing.crf:
            parameters = crf_parameters(testing.crf, "--crf")
            labels = dense_crf(np.array(image), labels, parameters)
        mask = labels.argmax(0).numpy().astype(np.uint8)
        target = options.output / f"{path.stem}.png"
        save_mask(target, mask)
        if options.overlays:
            overlay = to_image(mask_overlay(to_grey(image), mask))
            overlay.save(options.output / f"{path.stem}-overlay.png")
        shown = ", ".join(found.classes[label - 1] for label in np.unique(mask[mask > 0]))
        print(f"{target}: {shown or 'background alone'}")
