"""Real photo cut-outs placed on real photos by a program: the data set that needs no data.

The objects are stamps of the drawing program Tux Paint, the backgrounds its photo templates, both
from Debian (GPL-2), fetched when first needed and never part of this package. Cut-outs and
backgrounds of val are not seen in train. It is not VOC: objects cast no shadow, and the program
decides where they stand.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from PIL import Image, ImageFilter
from pydantic import Field
from rich.console import Console

from lpcam.data.compose import Sprite
from lpcam.data.dataset import open_image
from lpcam.data.debian import fetch
from lpcam.data.voc_tree import GeneratedVOC, Pictures, Sides, Span
from lpcam.settings import CHECKED, Pair, Share, Text
from lpcam.storage.hashing import digest, file_digest
from lpcam.storage.locks import locked

LISTED = json.loads(Path(__file__).with_name("photo_cutouts.json").read_text())
# Every photo that is used, relative to the folder of the sources.
PHOTOS = [
    *(f"templates/{name}.jpg" for names in LISTED["backgrounds"].values() for name in names),
    *(f"stamps/{name}.png" for names in LISTED["classes"].values() for name in names),
]
# Where the two kinds come from, and the size of the download in MB.
PACKAGES = {"templates": ("tuxpaint-data", 8), "stamps": ("tuxpaint-stamps-default", 161)}
# Raise it when the same settings give other pictures.
VERSION = 1


class Cutouts(GeneratedVOC):
    """Ten classes of photo cut-outs on photos.

    Args:
        root: The folder of the trees; the photos are kept beside it, in ``sources/tuxpaint``.
        train: Pictures in train.
        val: Pictures in val.
        sizes: Pixels; a picture's height and width are each drawn from these.
        train_share: The share of each class's cut-outs, and of each group of backgrounds, that
            goes to train; both splits get at least one.
        brightness: Range of the factor on an object's brightness.
        background_zoom: Range of the background crop's size, relative to the largest that fits.
        **shared: See :class:`~lpcam.data.voc_tree.GeneratedVOC`.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        *,
        train: Pictures = 300,
        val: Pictures = 100,
        sizes: Sides = (256, 288, 320),
        train_share: Share = 0.7,
        brightness: Pair[Annotated[float, Field(ge=0, le=2)]] = (0.85, 1.15),
        background_zoom: Pair[Span] = (0.6, 1.0),
        **shared: Any,
    ) -> None:
        self.train_share = train_share
        self.brightness = brightness
        self.background_zoom = background_zoom
        material = {
            "version": VERSION,
            "listed": digest(LISTED),
            "train_share": self.train_share,
            "brightness": list(self.brightness),
            "background_zoom": list(self.background_zoom),
        }
        super().__init__(
            root=root,
            classes=tuple(LISTED["classes"]),
            material=material,
            train=train,
            val=val,
            sizes=sizes,
            **shared,
        )
        self.sources = self.root.parent.parent / "sources" / "tuxpaint"
        rng = np.random.default_rng([self.seed, 2])
        self.cutouts = _divide(LISTED["classes"], self.train_share, rng)
        self.backgrounds = _divide(LISTED["backgrounds"], self.train_share, rng)

    def _collect(self) -> dict[str, Any]:
        _fetch_photos(self.sources)
        return {
            "cutouts": self.cutouts,
            "backgrounds": self.backgrounds,
            "inputs": {name: file_digest(self.sources / name) for name in PHOTOS},
        }

    def _background(
        self, split: str, label: int, size: tuple[int, int], rng: np.random.Generator
    ) -> np.ndarray:
        groups = self.backgrounds[split]
        tied = groups.get(LISTED["ties"].get(self.classes[label]), [])
        name = self._choose(tied, [name for group in groups.values() for name in group], rng)
        photo = _open_template(self.sources / "templates" / f"{name}.jpg")
        height, width = size
        scale = min(photo.height / height, photo.width / width) * rng.uniform(*self.background_zoom)
        left = rng.uniform(0, photo.width - scale * width)
        top = rng.uniform(0, photo.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        crop = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box))
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def _sprite(self, split: str, label: int, span: int, rng: np.random.Generator) -> Sprite:
        name = rng.choice(self.cutouts[split][self.classes[label]])
        stamp = _open_stamp(self.sources / "stamps" / f"{name}.png")
        scale = span / max(stamp.size)
        size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
        # Pillow weighs colours by alpha, so nothing of what is transparent bleeds into the rim.
        pixels = np.asarray(stamp.resize(size, Image.Resampling.BICUBIC), np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        colour = np.minimum(pixels[..., :3] * rng.uniform(*self.brightness), 255)
        return Sprite(label, colour, pixels[..., 3] / 255)


def _divide(
    groups: dict[str, list[str]], train_share: float, rng: np.random.Generator
) -> dict[str, dict[str, list[str]]]:
    """Divide the members of each group between the splits, at least one to each."""
    divided: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for group, names in groups.items():
        order = [names[place] for place in rng.permutation(len(names))]
        cut = min(max(round(train_share * len(names)), 1), len(names) - 1)
        divided["train"][group], divided["val"][group] = sorted(order[:cut]), sorted(order[cut:])
    return divided


@functools.cache
def _open_template(path: Path) -> Image.Image:
    """Open a template without the black bars that one of them has."""
    photo = open_image(path).convert("RGB")
    return photo.crop(photo.convert("L").point(lambda value: 255 * (value > 32)).getbbox())


@functools.cache
def _open_stamp(path: Path) -> Image.Image:
    """Open a stamp, cut to what is more than half opaque."""
    image = open_image(path)
    stamp = image.convert("RGBA")
    alpha = stamp.getchannel("A")
    if image.mode == "P":
        # Those without soft edges were cut out with a rim of the white page they lay on.
        alpha = alpha.filter(ImageFilter.MinFilter(3))
        stamp.putalpha(alpha)
    return stamp.crop(alpha.point(lambda value: 255 * (value > 127)).getbbox())


def _fetch_photos(folder: Path) -> None:
    """Fetch the photos from Debian unless they are there.

    Raises:
        InputError: They cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        for kind, (package, megabytes) in PACKAGES.items():
            names = [name for name in PHOTOS if name.startswith(f"{kind}/")]
            if all((folder / name).is_file() for name in names):
                continue
            partial = folder / f"{kind}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            members = {f"usr/share/tuxpaint/{name}": partial / name for name in names}
            with Console(stderr=True).status(f"Fetching {package} from Debian ({megabytes} MB)"):
                fetch(package, members, partial, "use dataset=shapes")
            shutil.rmtree(folder / kind, ignore_errors=True)
            (partial / kind).rename(folder / kind)
            partial.rmdir()
