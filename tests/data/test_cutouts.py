"""These fetch two Debian packages once a session; without apt-get or a mirror they are skipped."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lpcam.data.cutouts import Cutouts
from lpcam.errors import InputError

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "cutouts.yaml"
SMALL = {"train": 20, "val": 10, "sizes": [128, 144]}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A data folder that holds the photos."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("apt-get or dpkg-deb is not here")
    probe = ["apt-get", "download", "tuxpaint-data"]
    place = tmp_path_factory.mktemp("probe")
    if subprocess.run(probe, cwd=place, capture_output=True).returncode:
        if os.geteuid() == 0:
            subprocess.run(["apt-get", "update"], capture_output=True)
        if subprocess.run(probe, cwd=place, capture_output=True).returncode:
            pytest.skip("apt-get cannot download tuxpaint-data")
    folder = tmp_path_factory.mktemp("data")
    Cutouts(folder / "first", train=1, val=1, sizes=[64]).prepare()
    return folder


@pytest.fixture(scope="session")
def dataset(base):
    cutouts = Cutouts(base / "shared", **SMALL)
    cutouts.prepare()
    return cutouts


def content(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_same_seed_gives_the_same_bytes_without_another_download(
    base, dataset, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    again = Cutouts(base / "again", **SMALL)
    again.prepare()
    assert content(again.root) == content(dataset.root)


def test_another_seed_gives_other_pictures_and_splits(base, dataset):
    other = Cutouts(base / "shared", seed=1, **SMALL)
    other.prepare()
    first, second = content(dataset.root), content(other.root)
    assert not any(first[name] == second[name] for name in first if name.startswith("JPEGImages"))
    assert dataset.cutouts != other.cutouts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_no_photo_is_in_both_splits(tmp_path, seed, share):
    cutouts = Cutouts(tmp_path, seed=seed, train_share=share)
    for divided in (cutouts.cutouts, cutouts.backgrounds):
        assert divided["train"].keys() == divided["val"].keys()
        for group in divided["train"]:
            train, val = divided["train"][group], divided["val"][group]
            assert train
            assert val
            assert not set(train) & set(val)
            if share == 0.7:
                assert abs(len(train) - 0.7 * (len(train) + len(val))) <= 1


def test_the_manifest_names_every_photo_with_its_hash(base, dataset):
    manifest = json.loads((dataset.root / "manifest.json").read_text())
    sources = base / "sources" / "tuxpaint"
    assert manifest["inputs"] == content(sources)
    used = [
        f"{kind}/{name}.{extension}"
        for kind, extension, divided in (
            ("stamps", "png", manifest["cutouts"]),
            ("templates", "jpg", manifest["backgrounds"]),
        )
        for split in ("train", "val")
        for names in divided[split].values()
        for name in names
    ]
    assert sorted(used) == sorted(manifest["inputs"])


def stamp_distances(base, dataset, picture):
    """How far the object is from each stamp of its class: mean difference of colours."""
    mask = dataset.mask(picture) > 0
    left, top, right, bottom = box_of(mask)
    seen = np.asarray(Image.open(picture.path), np.float64)[top:bottom, left:right]
    inside = mask[top:bottom, left:right]
    distances = {}
    name = dataset.classes[picture.labels[0]]
    for stamp in dataset.cutouts["train"][name] + dataset.cutouts["val"][name]:
        image = Image.open(base / "sources" / "tuxpaint" / "stamps" / f"{stamp}.png")
        image = image.convert("RGBA")
        opaque = np.asarray(image)[..., 3] > 127
        image = image.crop([int(side) for side in box_of(opaque)]).resize(seen.shape[1::-1])
        pixels = np.asarray(image, np.float64)[..., :3]
        distances[stamp] = min(
            np.abs(seen - candidate)[inside].mean() for candidate in (pixels, pixels[:, ::-1])
        )
    return distances


@pytest.fixture(scope="session")
def plain(base):
    """Lone objects of their own brightness on backgrounds as large as they get, always tied."""
    cutouts = Cutouts(
        base / "plain", train=20, val=20, sizes=[128], pair_probability=0, brightness=[1, 1],
        background_zoom=[1, 1], context_probability=1,
    )  # fmt: skip
    cutouts.prepare()
    return cutouts


def test_the_objects_seen_are_those_of_the_split(base, plain):
    for split in ("train", "val"):
        for picture in plain.pictures(split):
            distances = stamp_distances(base, plain, picture)
            nearest = min(distances, key=distances.get)
            assert nearest in plain.cutouts[split][plain.classes[picture.labels[0]]]
            assert distances[nearest] < 20


def photo_distance(photo, image, outside):
    """The least mean difference to any crop of the photo as high, or as wide, as the picture."""
    scale = max(128 / photo.width, 128 / photo.height)
    size = (round(photo.width * scale), round(photo.height * scale))
    whole = np.asarray(photo.resize(size, Image.Resampling.BICUBIC), np.float64)
    crops = (
        whole[top : top + 128, left : left + 128]
        for top in range(size[1] - 127)
        for left in range(size[0] - 127)
    )
    return min(
        np.abs(image[::4, ::4] - crop[::4, ::4])[outside[::4, ::4]].mean()
        for crop in crops
        for crop in (crop, crop[:, ::-1])
    )


def test_the_backgrounds_seen_are_those_of_the_split_and_of_the_tie(base, plain):
    photos = {}
    for path in (base / "sources" / "tuxpaint" / "templates").iterdir():
        photo = Image.open(path).convert("RGB")
        # The one with black bars above and below.
        photos[path.stem] = photo.crop((0, 27, 640, 454)) if path.stem == "mossy_bark" else photo
    ties = {"bird": "sky", "cattle": "ground", "bigcat": "forest", "fish": "water",
            "flower": "leaves"}  # fmt: skip
    for split in ("train", "val"):
        groups = plain.backgrounds[split]
        for picture in plain.pictures(split)[:7]:
            image = np.asarray(Image.open(picture.path), np.float64)
            outside = plain.mask(picture) == 0
            distances = {
                name: photo_distance(photo, image, outside) for name, photo in photos.items()
            }
            tie = ties.get(plain.classes[picture.labels[0]])
            allowed = groups[tie] if tie else {name for names in groups.values() for name in names}
            assert min(distances, key=distances.get) in allowed


def test_lone_objects_span_what_is_asked_and_lie_wholly_inside(plain):
    spans = []
    for picture in plain.pictures("train") + plain.pictures("val"):
        left, top, right, bottom = box_of(plain.mask(picture))
        spans.append(max(right - left, bottom - top) / 128)
    # Enlarging may take a pixel off the rim on each side.
    assert min(spans) >= 0.65 - 2 / 128
    assert max(spans) <= 1
    assert max(spans) - min(spans) > 0.2


def test_objects_of_a_pair_are_smaller_and_both_seen(base):
    cutouts = Cutouts(base / "pairs", train=20, val=1, sizes=[128], pair_probability=1)
    cutouts.prepare()
    for picture in cutouts.pictures("train"):
        mask = cutouts.mask(picture)
        assert set(np.unique(mask)) - {0} == {label + 1 for label in picture.labels}
        if len(picture.labels) == 2:
            spans = []
            for label in picture.labels:
                left, top, right, bottom = box_of(mask == label + 1)
                spans.append(max(right - left, bottom - top) / 128)
            assert max(spans) <= 0.65 + 1 / 128
            # At least the one in front is whole.
            assert max(spans) >= 0.45 - 2 / 128


def test_a_damaged_tree_is_rebuilt(base, dataset):
    before = content(dataset.root)
    picture = dataset.pictures("train")[4]
    picture.path.write_bytes(picture.path.read_bytes()[:1000])
    dataset.pictures("val")[2].mask_path.unlink()
    dataset.prepare()
    assert content(dataset.root) == before


def test_a_lost_photo_is_fetched_again(base, tmp_path):
    shutil.copytree(base / "sources", tmp_path / "sources")
    (tmp_path / "sources" / "tuxpaint" / "templates" / "rocks.jpg").unlink()
    Cutouts(tmp_path / "cutouts", train=1, val=1, sizes=[64]).prepare()
    assert content(tmp_path / "sources" / "tuxpaint") == content(base / "sources" / "tuxpaint")


def test_without_apt_the_other_data_set_is_offered(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get: not found.*dataset=shapes") as caught:
        Cutouts(tmp_path / "cutouts").prepare()
    assert "\n" not in str(caught.value)


def test_the_config_says_what_the_code_does(tmp_path):
    config = OmegaConf.create({"paths": {"data": str(tmp_path)}, "dataset": OmegaConf.load(CONF)})
    configured = instantiate(config.dataset, _convert_="all")
    assert isinstance(configured, Cutouts)
    assert configured.root == Cutouts(tmp_path / "cutouts").root
    assert configured.settings == Cutouts(tmp_path / "cutouts").settings
    assert configured.map_splits == ("train", "val")
