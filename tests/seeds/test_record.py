import math
from collections.abc import Iterator
from pathlib import Path

import imgviz
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpcam.data.transforms import normalize, rescale
from lpcam.errors import InputError
from lpcam.functional import prototype_directions
from lpcam.models.backbones import build_backbone
from lpcam.prototypes.maps import MapMaker, MapSetting
from lpcam.seeds.record import STEP, SeedRecord, grid_size, load_seed, save_seed
from tests.oracles.interpolation import bilinear
from tests.prototypes.map_cases import host_views


def random_seed_record(classes: int = 2) -> SeedRecord:
    maps = np.random.default_rng(0).random((classes, 5, 7), dtype=np.float32)
    return SeedRecord(np.arange(classes) * 3, maps, (19, 26))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "2007_000032.npz"
    save_seed(path, random_seed_record())
    return path


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_round_trip(tmp_path: Path, classes: int) -> None:
    seed = random_seed_record(classes)
    save_seed(tmp_path / "a.npz", seed)

    loaded = load_seed(tmp_path / "a.npz")

    np.testing.assert_array_equal(loaded.keys, seed.keys)
    np.testing.assert_allclose(loaded.maps, seed.maps, rtol=0, atol=STEP / 2)
    assert not (loaded.maps.astype(np.float64) % STEP).any()  # float16 holds every multiple
    assert loaded.size == seed.size
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_format(record: Path) -> None:
    with np.load(record, allow_pickle=False) as file:
        assert {name: (file[name].dtype, file[name].shape) for name in file} == {
            "keys": (np.int64, (2,)),
            "maps": (np.float16, (2, 5, 7)),
            "size": (np.int64, (2,)),
        }


def test_equal_maps_make_equal_files(record: Path) -> None:
    content = record.read_bytes()
    save_seed(record, load_seed(record))
    assert record.read_bytes() == content


def test_disk(tmp_path: Path) -> None:
    """Each map of a VOC photo by ImageNet features takes 12 KB at most, alone in its file."""
    photo = Image.open(Path(imgviz.__file__).parent / "data" / "voc" / "rgb.jpg")
    assert photo.size == (500, 375)
    backbone = build_backbone("efficientnet_lite0").eval()
    features = []
    with torch.inference_mode():
        for scale in (0.5, 1.0, 1.5, 2.0):
            view = normalize(rescale(photo, scale), backbone.mean, backbone.std)
            features.append(backbone(view[None])[None])
    weight = backbone.network.classifier.weight.detach()[::50]
    rows = features[1][0, 0].flatten(1).T[::19, None]
    directions = prototype_directions(list(rows[:20]), list(rows[20:40]))
    maker = MapMaker([MapSetting(), MapSetting(directions)])
    labels = torch.ones(1, len(weight)).bool()
    maps = torch.stack(maker(host_views(features, weight), labels, (375, 500)))
    assert maps.shape == (2, 20, 94, 125)
    sizes = []
    for one in maps.flatten(0, 1):
        save_seed(tmp_path / "a.npz", SeedRecord(np.array([3]), one[None].numpy(), (375, 500)))
        sizes.append((tmp_path / "a.npz").stat().st_size)
        error = load_seed(tmp_path / "a.npz").maps[0] - one.numpy()
        assert np.abs(error).max() <= STEP / 2 + 1e-7  # of single precision
    assert max(sizes) <= 12000


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.npz"
    with pytest.raises(InputError, match=r"none\.npz"):
        load_seed(path)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04" + bytes(50)])
def test_what_is_no_record_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.npz") as caught:
        load_seed(path)
    assert "\n" not in str(caught.value)


def test_other_arrays_are_no_record(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    good = {"keys": np.array([1]), "maps": np.zeros((1, 2, 2)), "size": np.array([8, 8])}
    for wrong in (
        {"maps": good["maps"], "size": good["size"]},
        {**good, "size": np.array([1, 2, 3])},
        {**good, "keys": np.array([{"a": 1}], dtype=object)},
    ):
        np.savez(path, **wrong)
        with pytest.raises(InputError, match=r"other\.npz"):
            load_seed(path)
    with path.open("wb") as file:
        np.save(file, good["maps"])
    with pytest.raises(InputError, match=r"other\.npz"):
        load_seed(path)


def damaged(content: bytes) -> Iterator[bytes]:
    """The file cut short at every byte, and with every byte changed in two ways."""
    for i, byte in enumerate(content):
        yield content[:i]
        for bits in (1, 255):
            yield content[:i] + bytes([byte ^ bits]) + content[i + 1 :]


def test_damage_is_an_input_error_or_harmless(record: Path) -> None:
    good = load_seed(record)
    refused = 0
    for content in damaged(record.read_bytes()):
        record.write_bytes(content)
        try:
            loaded = load_seed(record)
        except InputError:
            refused += 1
            continue
        # A time stamp inside the archive, say: what was read must be right all the same.
        np.testing.assert_array_equal(loaded.keys, good.keys)
        np.testing.assert_array_equal(loaded.maps, good.maps)
        assert loaded.size == good.size
    assert refused > 1000


@pytest.mark.parametrize("size", [(19, 26), (5, 7), (4, 30)])
def test_full_size(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(1).random((2, 5, 7)).astype(np.float16)
    full = SeedRecord(np.array([0, 4]), maps, size).full_size()
    assert full.dtype == torch.float32
    expected = [bilinear(values.astype(np.float64), size) for values in maps]
    np.testing.assert_allclose(full.numpy(), expected, rtol=0, atol=1e-6)


def test_full_size_without_classes() -> None:
    seed = SeedRecord(np.zeros(0, np.int64), np.zeros((0, 5, 7), np.float16), (19, 26))
    assert seed.full_size().shape == (0, 19, 26)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_grid_is_a_quarter_rounded_up(height: int, width: int) -> None:
    assert grid_size((height, width)) == (math.ceil(height / 4), math.ceil(width / 4))
