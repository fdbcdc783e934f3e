"""Batches of crops that are the same whenever and wherever they are made.

A training is a sequence of crops; the crop at a position depends on the seed and the position
alone. So one that was killed goes on as if nothing had happened, and the number of processes that
load pictures changes nothing.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lpcam.data.crops import RandomCrop
from lpcam.data.dataset import Picture, open_picture
from lpcam.data.loaders import decoders
from lpcam.segmentation.masks import Masks

# Pixels ``(B, 3, S, S)``, labels ``(B, S, S)`` int64, weights ``(B, S, S)`` in 0..1.
Batch = tuple[Tensor, Tensor, Tensor]


class MaskedCrops(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Crops of pictures and of their masks.

    Args:
        pictures: The pictures.
        masks: Their masks.
        crop: What cuts them out.
        seed: Of their order and of the crops.
        confidence: Whether pixels count by how far their label is believed, or alike.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        masks: Masks,
        crop: RandomCrop,
        *,
        seed: int,
        confidence: bool,
    ) -> None:
        self.pictures = pictures
        self.masks = masks
        self.crop = crop
        self.seed = seed
        self.confidence = confidence

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """The crop at a position of the endless sequence: see :data:`Batch`."""
        turn, place = divmod(position, len(self.pictures))
        picture = self.pictures[_order(len(self.pictures), self.seed, turn)[place]]
        layers = [Image.fromarray(self.masks.read(picture))]
        if self.confidence:
            layers.append(Image.fromarray(self.masks.confidence(picture)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, position))
            pixels, labels, *weights = self.crop.both(open_picture(picture.path), *layers)
        weight = weights[0].float() / 255 if weights else torch.ones(labels.shape)
        return pixels, labels, weight


class Rounds(DistributedSampler[int]):
    """The positions of one round after another, which processes take in turn.

    Lightning calls a round an epoch, and says which it is, after a restart too. In a job of several
    processes it would replace a sampler of another kind.

    Args:
        data: What is sampled.
        count: Positions of a round, of all processes together.
        processes: How many share them.
        rank: Which of them this is.
        first: The round to begin with. Lightning names it only after processes that load pictures
            have begun.
    """

    def __init__(
        self, data: MaskedCrops, count: int, processes: int, rank: int, first: int = 0
    ) -> None:
        super().__init__(data, processes, rank, shuffle=False)
        self.count = count
        self.set_epoch(first)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.count
        return iter(range(start + self.rank, start + self.count, self.num_replicas))

    def __len__(self) -> int:
        return self.count // self.num_replicas


def crop_loader(
    data: MaskedCrops,
    *,
    steps: int,
    batch_size: int,
    processes: int,
    rank: int,
    first: int,
    num_workers: int | None,
) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
    """Rounds of batches.

    Args:
        data: The crops.
        steps: Batches of a round.
        batch_size: Crops a batch and process.
        processes: How many processes share the crops.
        rank: Which of them this is.
        first: The round to begin with.
        num_workers: Processes that decode.
    """
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=Rounds(data, steps * batch_size * processes, processes, rank, first),
        **decoders(num_workers),
    )


def seed_of(*numbers: int) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(seed, turn))
    return torch.randperm(count, generator=generator).tolist()
