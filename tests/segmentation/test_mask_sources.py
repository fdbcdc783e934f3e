"""Masks to learn from: whose they are, what they hold, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.shapes import Shapes
from lpcam.errors import InputError
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.seeds.palette import save_mask
from lpcam.seeds.record import SeedRecord, save_seed
from lpcam.segmentation.masks import PseudoMasks, TrueMasks, open_masks, usable


@pytest.fixture
def dataset(tmp_path: Path) -> Shapes:
    shapes = Shapes(tmp_path / "shapes", train=4, val=1, sizes=(64, 76))
    shapes.prepare()
    return shapes


def fake_run(folder: Path, dataset: Shapes, classes: tuple[str, ...] | None = None) -> Path:
    """A run's folder whose masks are the true ones and whose maps are sure by 0.75."""
    for name in ("masks", "maps"):
        (folder / name).mkdir(parents=True)
    for picture in dataset.pictures("train"):
        mask = dataset.mask(picture)
        assert mask is not None
        save_mask(folder / "masks" / f"{picture.id}.png", mask)
        keys = np.array(picture.labels)
        maps = np.stack([np.where(mask == key + 1, 0.75, 0.25) for key in keys])
        save_seed(folder / "maps" / f"{picture.id}.npz", SeedRecord(keys, maps, mask.shape))
    names = classes or dataset.classes
    empty = tuple(torch.zeros(0, 2) for _ in names)
    indices = tuple(([], []) for _ in names)
    Prototypes(names, empty, empty, indices).save(folder / "prototypes.safetensors")
    return folder


def test_the_masks_of_a_run_and_a_bare_folder_are_the_same(dataset: Shapes, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", dataset)
    pictures = dataset.pictures("train")
    masks, bare = (open_masks(str(f), dataset) for f in (run, run / "masks"))
    assert masks.digest(pictures) == bare.digest(pictures)
    for picture in pictures:
        np.testing.assert_array_equal(masks.read(picture), dataset.mask(picture))
    assert usable(masks, pictures) == pictures
    before = masks.digest(pictures)
    changed = masks.read(pictures[2]).copy()
    changed[0, 0] = 255
    save_mask(run / "masks" / f"{pictures[2].id}.png", changed)
    assert masks.digest(pictures) != before


def test_confidence_is_the_score_of_the_label(dataset: Shapes, tmp_path: Path) -> None:
    masks = PseudoMasks(fake_run(tmp_path / "run", dataset), dataset.classes)
    for picture in dataset.pictures("train"):
        # Objects score 0.75 and background, where 0.25 is the strongest, is believed as much.
        np.testing.assert_array_equal(masks.confidence(picture), 191)
    pictures = dataset.pictures("train")
    before = masks.confidence_digest(pictures)
    refined = tmp_path / "run" / "refined"
    (tmp_path / "run" / "maps").rename(refined)
    assert masks.confidence_digest(pictures) == before
    seed = SeedRecord(np.array([0]), np.full((1, 4, 4), 0.5, np.float16), (64, 64))
    save_seed(refined / f"{pictures[0].id}.npz", seed)
    assert masks.confidence_digest(pictures) != before


def test_true_masks(dataset: Shapes) -> None:
    masks = open_masks("truth", dataset)
    assert isinstance(masks, TrueMasks)
    pictures = dataset.pictures("train")
    np.testing.assert_array_equal(masks.read(pictures[0]), dataset.mask(pictures[0]))
    assert (masks.confidence(pictures[0]) == 255).all()
    pictures[1].mask_path.unlink()
    unmasked = Shapes.pictures(Shapes(dataset.root.parent, train=4, val=1, sizes=(64, 76)), "train")
    with pytest.raises(InputError, match=r"^masks=truth: 1 of 4 pictures have no mask"):
        masks.digest(unmasked)


def test_what_does_not_fit_is_named(dataset: Shapes, tmp_path: Path) -> None:
    pictures = dataset.pictures("train")
    with pytest.raises(InputError, match=r"^masks=.*nowhere: no such folder"):
        open_masks(str(tmp_path / "nowhere"), dataset)
    other = fake_run(tmp_path / "other", dataset, classes=("cat", "dog", "cow", "emu"))
    with pytest.raises(InputError, match=r"^masks=.*other: of the classes cat, dog, cow, 1 more"):
        open_masks(str(other), dataset)
    run = fake_run(tmp_path / "run", dataset)
    masks = open_masks(str(run), dataset)
    first = run / "masks" / f"{pictures[0].id}.png"
    kept = first.read_bytes()
    for wrong, line in (
        (np.full((64, 64), 9, np.uint8), "holds 9, but there are 4 classes"),
        (np.zeros((3, 5), np.uint8), "mask of 5x3 pixels, picture of"),
    ):
        save_mask(first, wrong)
        with pytest.raises(InputError, match=line):
            usable(masks, pictures)
    Image.new("RGB", (64, 64)).save(first)
    with pytest.raises(InputError, match="mask of mode RGB"):
        usable(masks, pictures)
    first.write_bytes(kept[:50])
    with pytest.raises(InputError, match="not a readable image"):
        usable(masks, pictures)
    first.unlink()
    with pytest.raises(
        InputError, match=r"lacks 1 of 4 files .*; name the split among dataset.map"
    ):
        masks.digest(pictures)


def test_masks_without_a_sure_pixel_teach_nothing(dataset: Shapes, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", dataset)
    masks, pictures = open_masks(str(run), dataset), dataset.pictures("train")
    for number, picture in enumerate(pictures, 1):
        open_mask = np.full_like(masks.read(picture), 255)
        save_mask(run / "masks" / f"{picture.id}.png", open_mask)
        if number < len(pictures):
            assert usable(masks, pictures) == pictures[number:]
    with pytest.raises(
        InputError, match=r"^masks: no sure pixel in the 4 masks, all are 255; lower"
    ):
        usable(masks, pictures)
