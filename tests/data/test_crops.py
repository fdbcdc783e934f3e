from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpcam.data.crops import RandomCrop, by_factor, by_long_side

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # leaves bytes as they are
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def places(width: int, height: int) -> Image.Image:
    """A picture that tells where each pixel was: red its column, green its row, blue 200."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def content(pixels: Tensor) -> tuple[slice, slice]:
    """Rows and columns that are not padding, of a transformed picture of :func:`places`."""
    inside = pixels[2] != 0
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    assert inside[box].all()
    return box


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (12, 40), (20, 9)])
def test_a_square_crop_or_padding(size: tuple[int, int]) -> None:
    width, height = size
    crop = 16
    cut = RandomCrop(**PLAIN, scale=by_long_side((max(size), max(size))), crop=crop)
    torch.manual_seed(32)
    seen: set[tuple[int, int]] = set()
    flips: Counter[bool] = Counter()
    for _ in range(400):
        pixels = cut(places(width, height))
        assert pixels.shape == (3, crop, crop)
        rows, columns = content(pixels)
        assert rows.stop - rows.start == min(height, crop)
        assert columns.stop - columns.start == min(width, crop)
        outside = torch.ones(crop, crop).bool()
        outside[rows, columns] = False
        assert not pixels[:, outside].any()
        red, green = pixels[0, rows, columns].round(), pixels[1, rows, columns].round()
        assert (green.diff(dim=0) == 1).all()
        assert (green.diff(dim=1) == 0).all()
        assert (red.diff(dim=0) == 0).all()
        steps = set(red.diff(dim=1).flatten().tolist())
        assert steps in ({1.0}, {-1.0})
        flips[steps == {-1.0}] += 1
        top = int(green[0, 0]) if height > crop else rows.start
        left = int(red.min()) if width > crop else columns.start
        seen.add((top, left))
    assert 140 < flips[True] < 260
    spare = abs(height - crop), abs(width - crop)
    for axis in (0, 1):
        found = sorted({place[axis] for place in seen})
        assert (found[0], found[-1]) == (0, spare[axis])


@pytest.mark.parametrize("size", [(40, 30), (21, 60)])
def test_content_is_a_crop_of_the_resized_picture(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(33)
    image = Image.fromarray(rng.integers(1, 256, (*size[::-1], 3), dtype=np.uint8))
    low, high, crop = 20, 24, 10
    candidates: dict[bytes, int] = {}
    for side in range(low, high + 1):
        shape = tuple(round(length * side / max(size)) for length in size)
        resized = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
        for pixels in (resized, resized[:, ::-1]):
            height, width = pixels.shape[:2]
            for top in range(max(height - crop, 0) + 1):
                for left in range(max(width - crop, 0) + 1):
                    window = pixels[top : top + crop, left : left + crop]
                    candidates[np.ascontiguousarray(window).tobytes()] = side
    cut = RandomCrop(**PLAIN, scale=by_long_side((low, high)), crop=crop)
    torch.manual_seed(34)
    sides: Counter[int] = Counter()
    for _ in range(300):
        pixels = cut(image).permute(1, 2, 0)
        rows = pixels.any(2).any(1)
        columns = pixels.any(2).any(0)
        window = pixels[rows][:, columns].round().to(torch.uint8).contiguous()
        sides[candidates[window.numpy().tobytes()]] += 1
    assert sorted(sides) == list(range(low, high + 1))
    assert min(sides.values()) > 30


def test_padding_is_zero_after_normalisation() -> None:
    cut = RandomCrop(**GREY, scale=by_long_side((8, 8)), crop=12)
    torch.manual_seed(35)
    pixels = cut(Image.new("RGB", (8, 4), (255, 0, 255)))
    inside = pixels[0] == 1  # of white; black padding would be -1
    assert inside.sum() == 32
    assert (pixels[1, inside] == -1).all()
    assert not pixels[:, ~inside].any()


def test_torch_seed_decides() -> None:
    cut = RandomCrop(**GREY, scale=by_long_side((30, 60)), crop=24)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([cut(places(50, 40)) for _ in range(4)])

    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))
    drawn = draw(1)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("size", [(40, 30), (50, 11), (9, 70)])
def test_labels_stay_with_their_pixels(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(36)
    labels = rng.integers(1, 255, size[::-1], dtype=np.uint8)
    picture = Image.fromarray(labels[..., None].repeat(3, 2))
    cut = RandomCrop(**PLAIN, scale=by_factor((1, 1)), crop=24)
    torch.manual_seed(37)
    for _ in range(30):
        pixels, cropped = cut.both(picture, Image.fromarray(labels))
        assert (type(pixels), type(cropped)) == (Tensor, Tensor)
        assert pixels.shape == (3, 24, 24)
        assert (cropped.shape, cropped.dtype) == ((24, 24), torch.int64)
        known = cropped != 255
        assert int(known.sum()) == min(size[0], 24) * min(size[1], 24)
        torch.testing.assert_close(pixels[:, known].round().long(), cropped[known].expand(3, -1))
        assert not pixels[:, ~known].any()  # padded: the mean colour, and unknown labels


def test_labels_are_resized_to_the_nearest() -> None:
    labels = np.array([[0, 7], [255, 9]], np.uint8).repeat(10, 0).repeat(10, 1)
    picture = Image.new("RGB", (20, 20), (1, 1, 1))
    cut = RandomCrop(**PLAIN, scale=by_factor((0.5, 1.5)), crop=40)
    torch.manual_seed(38)
    sides = set()
    for _ in range(40):
        pixels, cropped = cut.both(picture, Image.fromarray(labels))
        assert set(cropped.unique().tolist()) == {0, 7, 9, 255}
        side = int(pixels[0].any(1).sum())
        sides.add(side)
        for label in (0, 7, 9):
            height, width = (int((cropped == label).any(dim).sum()) for dim in (1, 0))
            assert abs(height - side / 2) <= 1
            assert abs(width - side / 2) <= 1
    assert min(sides) < 13
    assert max(sides) > 27


@pytest.mark.parametrize("size", [(37, 50), (64, 33), (9, 70), (21, 6), (32, 32)])
@pytest.mark.parametrize("cell", [4, 8])
def test_crops_start_at_multiples_of_a_cell(size: tuple[int, int], cell: int) -> None:
    width, height = size
    cut = RandomCrop(**PLAIN, scale=by_factor((1, 1)), crop=32, cell=cell)
    torch.manual_seed(39)
    starts: list[set[int]] = [set(), set()]
    for _ in range(300):
        pixels = cut(places(width, height))
        rows, columns = content(pixels)
        assert rows.stop - rows.start == min(height, 32)
        assert columns.stop - columns.start == min(width, 32)
        red, green = pixels[0, rows, columns].round(), pixels[1, rows, columns].round()
        if red[0, 0] > red[0, -1]:  # mirrored: count from the other side
            columns = slice(32 - columns.stop, 32 - columns.start)
        first = int(green.min()), int(red.min())
        for axis, (length, place) in enumerate(((height, rows), (width, columns))):
            start = first[axis] if length > 32 else place.start
            assert start % cell == 0
            starts[axis].add(start)
    for length, found in zip((height, width), starts, strict=True):
        # Each is drawn, as far as the picture or the padding goes.
        assert found == set(range(0, abs(length - 32) + 1, cell))


@pytest.mark.parametrize("draw", [by_factor((0.5, 1.5)), by_long_side((20, 60))])
def test_scales_fill_their_range(draw: Callable[[tuple[int, int]], float]) -> None:
    torch.manual_seed(40)
    found = [draw((40, 30)) for _ in range(400)]
    assert 0.5 <= min(found) < 0.52
    assert 1.48 < max(found) <= 1.5
    assert np.mean(found) == pytest.approx(1, abs=0.05)


def test_a_long_side_is_reached_exactly() -> None:
    draw = by_long_side([37, 41])
    torch.manual_seed(41)
    sides = {round(draw(size) * max(size), 6) for size in ((49, 30), (30, 49)) for _ in range(100)}
    assert sides == {37, 38, 39, 40, 41}


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (10, 5), (7, 7)])
def test_the_whole_picture_without_chance(size: tuple[int, int]) -> None:
    cut = RandomCrop(**PLAIN, scale=by_long_side((50, 90)), crop=20)
    pixels = cut.whole(places(*size))
    assert pixels.shape == (3, 20, 20)
    assert type(pixels) is Tensor
    width, height = (round(side * 20 / max(size)) for side in size)
    shown = places(*size).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.zeros((20, 20, 3))
    expected[:height, :width] = np.asarray(shown)
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-3)
    assert torch.equal(cut.whole(places(*size)), pixels)
