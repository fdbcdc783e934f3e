from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.crops import RandomCrop, by_factor
from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from lpcam.refiners.heads import HeadRefiner, LabelledCrops, load_head, save_head
from lpcam.refiners.irn import IRN
from lpcam.refiners.psa import PSA


def crops_of(
    folder: Path,
    size: tuple[int, int],
    label: np.ndarray,
    *,
    crop: int,
    stride: int,
    scales: tuple[float, float] = (1, 1),
) -> tuple[LabelledCrops, list[str]]:
    """Crops of a picture whose red is its label, and the names of the labels that were made."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 0] = label
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "labels").mkdir()
    made: list[str] = []

    def make_label(picture: Picture, image: Image.Image) -> np.ndarray:
        made.append(picture.id)
        return label

    picture = Picture("a", folder / "a.png", (0,))
    cut = RandomCrop((0, 0, 0), (1, 1, 1), scale=by_factor(scales), crop=crop, cell=stride)
    return LabelledCrops([picture], folder / "labels", make_label, cut, stride), made


@pytest.mark.parametrize("size", [(40, 56), (17, 90), (9, 7)])
def test_labels_stay_with_their_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    label = np.random.default_rng(0).integers(1, 255, size).astype(np.uint8)
    crops, _ = crops_of(tmp_path, size, label, crop=32, stride=4)
    torch.manual_seed(0)
    found = [crops[0] for _ in range(12)]
    for pixels, labels in found:
        assert pixels.shape == (3, 32, 32)
        assert labels.shape == (8, 8)
        red = (pixels[0] * 255).round().long()
        middles = red[2::4, 2::4]  # of cells, also where the picture is mirrored
        known = labels != 255
        assert known.any()
        assert torch.equal(middles[known], labels[known])
        assert (middles[~known] == 0).all()
    assert len({pixels.numpy().tobytes() for pixels, _ in found}) > 1


def test_cells_of_constant_labels_stay_whole(tmp_path: Path) -> None:
    cells = np.random.default_rng(0).integers(1, 255, (7, 9)).astype(np.uint8)
    label = cells.repeat(8, 0).repeat(8, 1)[:50, :70]
    crops, _ = crops_of(tmp_path, (50, 70), label, crop=32, stride=8)
    torch.manual_seed(0)
    for _ in range(8):
        pixels, labels = crops[0]
        red = (pixels[0] * 255).round().long().reshape(4, 8, 4, 8)
        assert torch.equal(red.amax((1, 3)), labels)
        assert torch.equal(red.amin((1, 3)), labels)


def test_scales(tmp_path: Path) -> None:
    label = np.full((40, 40), 9, np.uint8)
    crops, _ = crops_of(tmp_path, (40, 40), label, crop=64, stride=4, scales=(0.5, 1.5))
    torch.manual_seed(0)
    shares = [float((crops[0][1] == 9).float().mean()) for _ in range(30)]
    assert (20 / 64) ** 2 * 0.8 < min(shares) < (30 / 64) ** 2
    assert (50 / 64) ** 2 < max(shares) < (60 / 64) ** 2 * 1.2


def test_labels_are_made_once(tmp_path: Path) -> None:
    label = np.full((16, 16), 200, np.uint8)
    crops, made = crops_of(tmp_path, (16, 16), label, crop=16, stride=4)
    crops[0], crops[0]
    assert made == ["a"]
    with Image.open(tmp_path / "labels" / "a.png") as image:
        assert (np.asarray(image) == 200).all()


@pytest.mark.parametrize(
    ("kind", "settings"), [(IRN, {"crop": 72}), (IRN, {"crop": 78}), (PSA, {"crop": 64})]
)
def test_crops_that_leave_no_pair_are_refused(
    kind: type[HeadRefiner], settings: dict[str, int]
) -> None:
    IRN(crop=76)
    with pytest.raises(InputError, match=r"refiner\.crop="):
        kind(**settings)


def test_weights_come_back(tmp_path: Path) -> None:
    first, second, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), torch.nn.Linear(4, 3)
    with pytest.raises(InputError, match=r"heads\.safetensors"):
        load_head(tmp_path, second)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "last.ckpt").write_text("")
    save_head(tmp_path, first)
    load_head(tmp_path, second)
    assert torch.equal(first.weight, second.weight)
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(InputError, match="delete"):
        load_head(tmp_path, other)
    (tmp_path / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="delete"):
        load_head(tmp_path, second)
