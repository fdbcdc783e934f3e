from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from lpcam.refiners.crf import PARAMETERS, dense_crf
from lpcam.refiners.saliency import Saliency, saliency_labels
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord, load_seed, save_seed
from tests.oracles.saliency import labels as slow_labels

PICTURES = [Picture(name, Path(f"{name}.jpg"), (0,)) for name in ("a", "b")]
SCORES = st.sampled_from([0.0, 1e-6, 0.2, 0.25, 0.5, 0.95, 0.97, 1.0])


def save(folder: Path, name: str, saliency: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(saliency).save(folder / f"{name}.png")


@settings(max_examples=60, deadline=None)
@given(
    scores=hnp.arrays(
        np.float32, st.tuples(st.integers(0, 3), st.just(4), st.just(5)), elements=SCORES
    ),
    saliency=hnp.arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 19, 20, 21, 255])),
    bounds=st.sampled_from([(0.25, 0.95), (0.0, 0.5), (1e-6, 0.99999)]),
)
def test_equals_a_loop_over_pixels(
    scores: np.ndarray, saliency: np.ndarray, bounds: tuple[float, float]
) -> None:
    alpha, beta = (float(np.float32(bound)) for bound in bounds)
    found = saliency_labels(
        torch.from_numpy(scores), torch.from_numpy(saliency), theta=0.2, alpha=alpha, beta=beta
    )
    assert found.tolist() == slow_labels(scores, saliency, 0.2, alpha, beta).tolist()


@pytest.mark.parametrize("classes", [0, 1, 4])
@pytest.mark.parametrize("size", [(20, 30), (33, 500)])
def test_the_rules_label_is_that_of_the_record(
    tmp_path: Path, classes: int, size: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    saliency = random.integers(0, 40, size, dtype=np.uint8)
    save(tmp_path / "sal", "a", saliency)
    maps = random.random((classes, *size)).astype(np.float16)
    maps[:1] = 0
    seed = SeedRecord(2 * np.arange(classes), maps, size)

    refiner = Saliency(tmp_path / "sal", crf=None, alpha=0.5, beta=0.9)
    save_seed(tmp_path / "a.npz", refiner.refine("a", Image.new("RGB", size[::-1]), seed))

    loaded = load_seed(tmp_path / "a.npz")
    wanted = slow_labels(maps.astype(np.float32), saliency, 0.2, 0.5, float(np.float32(0.9)))
    found = seed_mask(loaded.full_size(), np.arange(classes), 0.5)
    assert found.tolist() == wanted.tolist()
    assert wanted.any() == (classes > 1)
    assert ((loaded.maps >= 0) & (loaded.maps <= 1)).all()


def test_the_crf_comes_first(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    saliency = random.integers(0, 40, (8, 9), dtype=np.uint8)
    save(tmp_path, "a", saliency)
    seed = SeedRecord(np.array([3, 5]), random.random((2, 8, 9)).astype(np.float16), (8, 9))

    found = Saliency(tmp_path, backend="exact").refine("a", image, seed)

    maps = seed.full_size()
    unary = torch.cat([1 - maps.amax(0, keepdim=True), maps])
    after = dense_crf(np.array(image), unary, PARAMETERS["edam"], backend="exact")[1:]
    wanted = slow_labels(after.numpy(), saliency, 0.2, 1e-6, 0.99999)
    assert seed_mask(found.full_size(), np.arange(2), 0.5).tolist() == wanted.tolist()


def test_published_bounds(tmp_path: Path) -> None:
    assert [Saliency(tmp_path, crf=None).alpha, Saliency(tmp_path, crf=None).beta] == [0.25, 0.95]
    assert [Saliency(tmp_path).alpha, Saliency(tmp_path).beta] == [1e-6, 0.99999]
    assert Saliency(tmp_path, alpha=0.1).alpha == 0.1


def test_inputs_follow_settings_and_files(tmp_path: Path) -> None:
    for picture in PICTURES:
        save(tmp_path / "sal", picture.id, np.zeros((4, 4), np.uint8))
    refiner = Saliency(tmp_path / "sal", backend="exact")
    before = refiner.inputs(PICTURES)

    assert refiner.uses == "saliency"
    assert before["crf"]["iterations"] == 3
    assert Saliency(tmp_path / "sal", backend="exact", crf="psa").inputs(PICTURES) != before
    save(tmp_path / "sal", "b", np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert refiner.inputs(PICTURES) != before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refiner\.folder=\S+none: no such folder") as caught:
        Saliency(tmp_path / "none", crf=None).inputs(PICTURES)
    assert "\n" not in str(caught.value)
    save(tmp_path / "sal", "a", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"sal lacks 1 of 2 files \(b\.png\)"):
        Saliency(tmp_path / "sal", crf=None).inputs(PICTURES)


@pytest.mark.parametrize("shape", [(4, 5), (4, 4, 3)])
def test_other_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path, "a", np.zeros(shape, np.uint8))
    seed = SeedRecord(np.array([0]), np.zeros((1, 1, 1), np.float16), (4, 4))
    with pytest.raises(InputError, match=r"a\.png: saliency of mode") as caught:
        Saliency(tmp_path, crf=None).refine("a", Image.new("RGB", (4, 4)), seed)
    assert "\n" not in str(caught.value)
