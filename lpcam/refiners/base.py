"""What every refiner offers: the maps of a picture in, better class scores out.

A refined record is a seed record like the one it was made from, on any grid, so that everything
that reads maps (masks, scores, pictures, the next refiner) reads refined ones too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from PIL import Image
from pydantic import AfterValidator

from lpcam.data.dataset import Picture
from lpcam.models.backbones import Backbone
from lpcam.models.training import MakeTrainer
from lpcam.seeds.record import SeedRecord
from lpcam.settings import CHECKED, Share, Text


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of several kinds
        raise ValueError("no such device here; take cpu") from error
    return device


Device = Annotated[Text, AfterValidator(_usable)]


class Refiner(ABC):
    """Turns the maps of one picture into better class scores.

    A subclass keeps its arguments in attributes of the same names: :meth:`inputs` gives them to the
    store as a result's key, all but ``source``, ``background`` and ``seed_background``; one that
    reads the last in :meth:`refine` adds it there. What it loads has names with ``_``.

    Args:
        source: Which maps are refined: ``cam`` or ``lpcam``.
        seed_background: The score that a class has to exceed in the maps' own masks, 0..1. What a
            refiner decides by scores follows it unless it is set.
        background: The score that a class has to exceed in the pseudo mask, 0..1; None for what
            follows from ``seed_background``.

    Attributes:
        uses: Supervision beyond image labels, such as "saliency"; empty for none. Results are
            marked with it.
        rule_of_thumb: Whether ``background`` only roughly follows from ``seed_background``, so that
            one that is chosen by looking at the scores is better.
    """

    uses: ClassVar[str] = ""

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        *,
        source: Literal["cam", "lpcam"] = "lpcam",
        seed_background: Share = 0.3,
        background: Share | None = None,
    ) -> None:
        self.source = source
        self.seed_background = seed_background
        self.background = self.mask_background if background is None else background

    @property
    def mask_background(self) -> float:
        """The background score of the pseudo mask that follows from ``seed_background``."""
        return self.seed_background

    @property
    def rule_of_thumb(self) -> bool:
        """See above."""
        return False

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:
        """Values that results depend on, besides the maps and the pictures; JSON can hold them.

        Called before anything is computed, so it is also where a refiner finds out what it lacks.

        Args:
            pictures: The pictures that will be refined. A refiner that reads files of its own adds
                a digest of them.

        Raises:
            InputError: A package or a file that the refiner needs is missing.
        """
        # None changes the scores: the source's maps have their own key, and what follows from
        # seed_background is among the others.
        left_out = ("source", "background", "seed_background")
        settings = {
            key: value
            for key, value in vars(self).items()
            if key not in left_out and not key.startswith("_")
        }
        return {"refiner": type(self).__name__, **settings}

    @abstractmethod
    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:
        """Refine the maps of one picture.

        Args:
            image_id: The picture's name.
            image: The picture, RGB, at its own size.
            seed: Its maps. There may be none, and a map may be zero everywhere.

        Returns:
            Scores in 0..1 of the same classes, at any resolution.
        """


class TrainedRefiner(Refiner):
    """A refiner whose network is trained on the maps of the training pictures first.

    What :meth:`fit` leaves in its folder is a stage of its own in the store. Settings that only
    matter in :meth:`refine` stay out of :meth:`training_inputs`, so that changing them does not
    train again.
    """

    @abstractmethod
    def training_inputs(self) -> Mapping[str, Any]:
        """The settings that training depends on; JSON can hold them."""

    @abstractmethod
    def fit(
        self,
        folder: Path,
        pictures: Sequence[Picture],
        read_seed: Callable[[Picture], SeedRecord],
        backbone: Backbone,
        make_trainer: MakeTrainer,
        *,
        num_workers: int | None,
    ) -> None:
        """Train, and leave safetensors files in a folder; go on from what a killed run left there.

        Args:
            folder: Where the files go.
            pictures: The training pictures.
            read_seed: Gives a picture's maps.
            backbone: The project's backbone; its weights are only read.
            make_trainer: Makes Lightning's trainer.
            num_workers: Processes that decode pictures.
        """

    @abstractmethod
    def load(self, folder: Path, backbone: Backbone, device: str) -> None:
        """Read what :meth:`fit` left, once before :meth:`refine` is called.

        Args:
            folder: The folder.
            backbone: The backbone that it was trained with.
            device: Where :meth:`refine` computes.
        """
