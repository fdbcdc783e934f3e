"""Data sets that a program makes: written once as a VOC tree, then read like any other."""

import collections
import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import numpy as np
import pydantic
from PIL import Image
from pydantic import Field
from rich.console import Console
from rich.progress import track

from lpcam.data.compose import Sample, Sprite, compose
from lpcam.data.dataset import Classes
from lpcam.data.voc import VOC
from lpcam.errors import InputError
from lpcam.seeds.palette import save_mask
from lpcam.settings import CHECKED, Pair, Seed, Share, Text
from lpcam.storage.files import write_json
from lpcam.storage.hashing import digest
from lpcam.storage.locks import locked

SPLITS = ("train", "val")
Pictures = Annotated[int, Field(ge=1, le=10**6)]
Sides = Annotated[Sequence[Annotated[int, Field(ge=32, le=4096)]], Field(min_length=1)]
Span = Annotated[float, Field(ge=0.05, le=1)]


class GeneratedVOC(VOC):
    """A VOC tree that :meth:`prepare` builds: train and val, one or two objects a picture.

    Each tree lies in ``<root>/seed<seed>-<hash of the settings>``, so trees of several seeds and
    settings live side by side. A picture depends on nothing but the settings, its split and its
    number in it: the same settings give the same bytes. ``manifest.json`` holds the settings,
    the counts, the material and the size of every file.

    Args:
        root: The folder of the trees.
        classes: Class names.
        material: The settings that only the subclass reads.
        seed: From 0; everything random follows from it.
        train: Pictures in train.
        val: Pictures in val.
        sizes: Pixels; a picture's height and width are each drawn from these.
        pair_probability: How often a picture shows two objects and not one.
        single_span: Range of a lone object's longer side, relative to the picture's shorter side.
        pair_span: The same for each object of a pair.
        min_visible: The share of an object that another may not cover.
        context_probability: How often a class that is tied to some backgrounds gets one of them;
            otherwise any background of the split. In a pair, the first object decides.
        jpeg_quality: 1 to 100.
        **splits: See :class:`~lpcam.data.dataset.SegmentationDataset`.

    Raises:
        InputError: A split is neither train nor val.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        root: Text | Path,
        classes: Classes,
        *,
        material: Mapping[str, Any],
        seed: Seed = 0,
        train: Pictures,
        val: Pictures,
        sizes: Sides,
        pair_probability: Share = 0.5,
        single_span: Pair[Span] = (0.65, 1.0),
        pair_span: Pair[Span] = (0.45, 0.65),
        min_visible: Annotated[float, Field(ge=0.01, le=1)] = 0.7,
        context_probability: Share = 0.7,
        jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95,
        **splits: Any,
    ) -> None:
        self.seed = seed
        self.counts = {"train": train, "val": val}
        self.sizes = list(sizes)
        self.pair_probability = pair_probability
        self.single_span = single_span
        self.pair_span = pair_span
        self.min_visible = min_visible
        self.context_probability = context_probability
        self.jpeg_quality = jpeg_quality
        self.settings = {
            **material,
            "seed": seed,
            **self.counts,
            "sizes": self.sizes,
            "pair_probability": pair_probability,
            "single_span": list(self.single_span),
            "pair_span": list(self.pair_span),
            "min_visible": min_visible,
            "context_probability": context_probability,
            "jpeg_quality": jpeg_quality,
        }
        folder = f"seed{seed}-{digest(self.settings)[:8]}"
        super().__init__(root=Path(root) / folder, tree_classes=classes, **splits)
        for split in self.used_splits:
            if split not in SPLITS:
                raise InputError(f"dataset: no split {split!r}; choose from {', '.join(SPLITS)}")

    @abstractmethod
    def _collect(self) -> dict[str, Any]:
        """Make the material ready; what the manifest shall say about it."""

    @abstractmethod
    def _background(
        self, split: str, label: int, size: tuple[int, int], rng: np.random.Generator
    ) -> np.ndarray:
        """Draw a background ``(H, W, 3)`` uint8 for a picture whose first object has this class."""

    @abstractmethod
    def _sprite(self, split: str, label: int, span: int, rng: np.random.Generator) -> Sprite:
        """Draw an object whose bounding box has a longer side of ``span`` pixels."""

    def _choose(self, tied: Sequence[str], every: Sequence[str], rng: np.random.Generator) -> str:
        """Choose a background: of those tied to the class if there are any and luck has it so."""
        pool = tied if tied and rng.random() < self.context_probability else every
        return str(rng.choice(pool))

    def prepare(self, *, labelled: bool = True) -> None:
        """Build the tree unless it is there and whole.

        A file that is missing or has another size than the manifest says, or a build that was
        cut short, has the whole tree built anew.

        Args:
            labelled: Makes no difference; every picture that is composed has labels.

        Raises:
            InputError: The folder cannot be written, or the material cannot be had.
        """
        if self._whole():
            return
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.root.parent}: {error}; set paths.data elsewhere") from error
        with locked(self.root.with_name(f"{self.root.name}.lock")):
            if not self._whole():
                self._build()

    def _whole(self) -> bool:
        try:
            manifest = json.loads((self.root / "manifest.json").read_text())
            return manifest["settings"] == self.settings and all(
                (self.root / name).stat().st_size == size
                for name, size in manifest["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def _build(self) -> None:
        record = self._collect()
        partial = self.root.with_name(f"{self.root.name}.partial")
        for folder in (partial, self.root):
            shutil.rmtree(folder, ignore_errors=True)
        lists = partial / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        for name in ("JPEGImages", "Annotations", "SegmentationClass"):
            (partial / name).mkdir()
        objects: dict[str, collections.Counter[int]] = {s: collections.Counter() for s in SPLITS}
        jobs = [(split, index) for split in SPLITS for index in range(self.counts[split])]
        title = f"Composing {self.root.parent.name}"
        console = Console(stderr=True)
        hidden = not console.is_terminal
        for split, index in track(jobs, title, console=console, transient=True, disable=hidden):
            sample = self._sample(split, index)
            self._write(partial, f"{split}_{index:05d}", sample)
            objects[split].update(label for label, _ in sample.objects)
        for split, count in self.counts.items():
            (lists / f"{split}.txt").write_text(
                "".join(f"{split}_{index:05d}\n" for index in range(count))
            )
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            "settings": self.settings,
            "objects": {
                split: {name: counter[label] for label, name in enumerate(self.classes)}
                for split, counter in objects.items()
            },
            **record,
            "files": {path.relative_to(partial).as_posix(): path.stat().st_size for path in files},
        }
        write_json(partial / "manifest.json", manifest)
        partial.rename(self.root)

    def _sample(self, split: str, index: int) -> Sample:
        """Compose a picture. The first object's class goes round, so that none is left out."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        height, width = (int(side) for side in rng.choice(self.sizes, 2))
        labels = [index % len(self.classes)]
        spans = self.single_span
        if rng.random() < self.pair_probability:
            labels.append(int(rng.integers(len(self.classes))))
            spans = self.pair_span
        background = self._background(split, labels[0], (height, width), rng)
        sprites = [
            self._sprite(split, label, round(rng.uniform(*spans) * min(height, width)), rng)
            for label in labels
        ]
        return compose(background, sprites, self.min_visible, rng)

    def _write(self, tree: Path, name: str, sample: Sample) -> None:
        image = Image.fromarray(sample.image)
        image.save(tree / "JPEGImages" / f"{name}.jpg", quality=self.jpeg_quality)
        save_mask(tree / "SegmentationClass" / f"{name}.png", sample.mask)
        if sample.parts is not None:
            (tree / "Parts").mkdir(exist_ok=True)
            save_mask(tree / "Parts" / f"{name}.png", sample.parts)
        annotation = self._annotation(name, sample)
        ElementTree.indent(annotation)
        ElementTree.ElementTree(annotation).write(tree / "Annotations" / f"{name}.xml")

    def _annotation(self, name: str, sample: Sample) -> ElementTree.Element:
        """Describe a picture as VOC does: boxes count from 1 and include their last pixel."""
        height, width = sample.mask.shape
        annotation = ElementTree.Element("annotation")
        _append(annotation, {"filename": f"{name}.jpg"})
        size = ElementTree.SubElement(annotation, "size")
        _append(size, {"width": width, "height": height, "depth": 3})
        for label, (left, top, right, bottom) in sample.objects:
            item = ElementTree.SubElement(annotation, "object")
            _append(item, {"name": self.classes[label], "difficult": 0})
            box = ElementTree.SubElement(item, "bndbox")
            _append(box, {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom})
        return annotation


def _append(parent: ElementTree.Element, texts: Mapping[str, str | int]) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)
