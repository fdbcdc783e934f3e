"""Crops of pictures and masks: their distribution, and that seed and position decide them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.crops import RandomCrop, by_choice
from lpcam.data.dataset import Picture
from lpcam.segmentation.crops import MaskedCrops, Rounds, crop_loader
from lpcam.segmentation.masks import PseudoMasks

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


def crops(root: Path, *, count: int = 5, seed: int = 0, crop: int = 24) -> MaskedCrops:
    """Pictures that tell where their pixels were, and masks that say which picture it is."""
    (root / "masks").mkdir(exist_ok=True)
    pictures = []
    for index in range(count):
        pixels = np.full((40, 50, 3), 200, np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(50), np.arange(40)[:, None]
        Image.fromarray(pixels).save(root / f"{index}.png")
        Image.fromarray(np.full((40, 50), index, np.uint8)).save(root / "masks" / f"{index}.png")
        pictures.append(Picture(str(index), root / f"{index}.png", ()))
    cut = RandomCrop(**PLAIN, scale=by_choice([0.5, 1.0, 1.5]), crop=crop)
    masks = PseudoMasks(root, ["a", "b", "c", "d"])
    return MaskedCrops(pictures, masks, cut, seed=seed, confidence=False)


def test_scales_are_chosen_alike() -> None:
    """The published recipe: a factor of 0.5, 0.75, 1, 1.25 or 1.5, each as likely."""
    factors = [0.5, 0.75, 1.0, 1.25, 1.5]
    draw = by_choice(factors)
    torch.manual_seed(0)
    found = Counter(draw((500, 375)) for _ in range(5000))
    assert set(found) == set(factors)
    assert all(900 < count < 1100 for count in found.values())


@pytest.mark.parametrize(("side", "crop"), [(40, 33), (30, 33)])
def test_places_and_mirror_images_are_as_likely(side: int, crop: int) -> None:
    """The published crop: any place at which it fits, mirrored half the time.

    A picture that is smaller than the crop lies at any place in it, not always in one corner.
    """
    pixels = np.full((side, side, 3), 200, np.uint8)
    pixels[..., 0] = np.arange(1, side + 1)
    labels = Image.fromarray(np.ones((side, side), np.uint8))
    cut = RandomCrop(**PLAIN, scale=by_choice([1.0]), crop=crop)
    torch.manual_seed(1)
    places: Counter[int] = Counter()
    mirrored = 0
    for _ in range(1200):
        found, known = cut.both(Image.fromarray(pixels), labels)
        rows = (known == 1).any(1)
        assert int(rows.sum()) == min(side, crop)
        row = found[0, int(rows.nonzero()[0])]
        flipped = bool(row[row > 0].diff()[0] < 0)
        mirrored += flipped
        row = row.flip(0) if flipped else row
        start = int(row[0]) - 1 if side > crop else int((row > 0).nonzero()[0])
        places[start] += 1
    assert 520 < mirrored < 680
    expected = 1200 / (abs(side - crop) + 1)
    assert set(places) == set(range(abs(side - crop) + 1))
    assert all(0.7 * expected < count < 1.3 * expected for count in places.values())


def test_each_turn_sees_every_picture_once(tmp_path: Path) -> None:
    data = crops(tmp_path)
    for turn in range(3):
        seen = [int(data[5 * turn + place][1].min()) for place in range(5)]
        assert sorted(seen) == list(range(5))
    orders = {tuple(int(data[5 * t + p][1].min()) for p in range(5)) for t in range(6)}
    assert len(orders) > 1


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_seed_and_position_decide_and_nothing_else(tmp_path: Path) -> None:
    data, other = crops(tmp_path), crops(tmp_path, seed=1)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    expected = data[13]
    assert torch.equal(torch.random.get_rng_state(), before)  # draws from nobody else's numbers
    torch.rand(100)
    data[2]
    assert same(data[13], expected)
    assert not same(other[13], expected)
    assert not same(data[18], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_rounds_follow_each_other_whoever_loads_them(tmp_path: Path, workers: int) -> None:
    data = crops(tmp_path)
    found = []
    for epoch in (0, 1):
        loader = crop_loader(
            data,
            steps=3,
            batch_size=2,
            processes=1,
            rank=0,
            first=epoch,
            num_workers=workers,
        )
        found += list(loader)
    assert len(found) == 6
    for step, batch in enumerate(found):
        for place in range(2):
            expected = data[2 * step + place]
            assert same(tuple(part[place] for part in batch), expected)


def test_processes_share_each_batch(tmp_path: Path) -> None:
    data = crops(tmp_path)
    samplers = [Rounds(data, 12, 2, rank) for rank in (0, 1)]
    for sampler in samplers:
        sampler.set_epoch(3)
    first, second = (list(sampler) for sampler in samplers)
    assert len(samplers[0]) == len(first) == len(second) == 6
    for step in range(3):  # of two processes that load two crops each
        shared = first[2 * step : 2 * step + 2] + second[2 * step : 2 * step + 2]
        assert sorted(shared) == [36 + 4 * step + place for place in range(4)]
