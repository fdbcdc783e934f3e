import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lpcam.errors import InputError
from lpcam.refiners import crf
from lpcam.refiners.crf import (
    CRF,
    PARAMETERS,
    CRFParameters,
    crf_parameters,
    dense_crf,
    label_probabilities,
    scores_against_background,
    with_background,
    wrapped_pixels,
)
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord, load_seed, save_seed
from tests.oracles.crf import mean_field


def random_inputs(
    size: tuple[int, int] = (6, 7), labels: int = 3
) -> tuple[np.ndarray, torch.Tensor]:
    random = np.random.default_rng(0)
    # Colours close enough for the bilateral kernel to reach further than a pixel.
    image = random.integers(100, 120, (*size, 3), dtype=np.uint8)
    return image, torch.from_numpy(random.random((labels, *size)))


def two_halves(height: int = 12, width: int = 14) -> tuple[np.ndarray, torch.Tensor]:
    """A dark and a bright half with a little noise, and what a good seed knows of them."""
    random = np.random.default_rng(0)
    image = random.integers(0, 8, (height, width, 3), dtype=np.uint8)
    image[:, width // 2 :] += 200
    probabilities = torch.full((2, height, width), 0.2)
    probabilities[0, :, : width // 2] = 0.8
    probabilities[1, :, width // 2 :] = 0.8
    return image, probabilities


@pytest.mark.parametrize("name", PARAMETERS)
def test_exact_equals_a_loop_over_pairs_of_pixels(name: str) -> None:
    image, probabilities = random_inputs()
    probabilities[0, 0, 0] = 0
    settings = PARAMETERS[name]

    found = dense_crf(image, probabilities, settings, backend="exact")

    wanted = mean_field(
        image,
        probabilities.numpy(),
        settings.iterations,
        (settings.gaussian_sxy, settings.gaussian_weight),
        (settings.bilateral_sxy, settings.bilateral_srgb, settings.bilateral_weight),
    )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-10)
    single = dense_crf(image, probabilities.float(), settings, backend="exact")
    np.testing.assert_allclose(single.numpy(), wanted, rtol=0, atol=1e-4)


def test_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, probabilities = random_inputs((9, 10))
    whole = dense_crf(image, probabilities, PARAMETERS["psa"], backend="exact")
    monkeypatch.setattr(crf, "BLOCK", 7 * 90)
    blocks = dense_crf(image, probabilities, PARAMETERS["psa"], backend="exact")
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-12)


def test_parameters_are_those_published() -> None:
    """Iterations, smoothness (sxy, weight), appearance (sxy, srgb, weight)."""
    assert {name: astuple(settings) for name, settings in PARAMETERS.items()} == {
        "irn_labels": (10, 3, 3, 50, 5, 10),
        "psa": (10, 3, 3, 80, 13, 10),
        "edam": (3, 3, 3, 80, 13, 10),
        "deeplab": (10, 1, 3, 67, 3, 4),
        "mctformer_seg": (10, 4, 3, 83, 5, 3),
        "afa": (10, 3, 3, 64, 5, 4),
    }
    assert crf_parameters("edam", "refiner.crf") is PARAMETERS["edam"]


@pytest.mark.parametrize("backend", ["exact", "pydensecrf"])
def test_labels_have_no_order(backend: str) -> None:
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, probabilities = random_inputs(labels=4)
    order = [2, 0, 3, 1]

    found = dense_crf(image, probabilities.float(), PARAMETERS["afa"], backend=backend)

    again = dense_crf(image, probabilities.float()[order], PARAMETERS["afa"], backend=backend)
    torch.testing.assert_close(again, found[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(6, 7), rtol=0, atol=1e-5)


def test_both_backends_agree_on_sure_pixels() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, probabilities = two_halves()

    for name, settings in PARAMETERS.items():
        lattice = dense_crf(image, probabilities, settings, backend="pydensecrf")
        exact = dense_crf(image, probabilities, settings, backend="exact")
        assert torch.equal(lattice.argmax(0), exact.argmax(0)), name
        torch.testing.assert_close(lattice, exact, rtol=0, atol=0.01)

    saturated = (probabilities > 0.5).float()
    settings = PARAMETERS["psa"]
    lattice = dense_crf(image, saturated, settings, backend="pydensecrf")
    torch.testing.assert_close(
        lattice, dense_crf(image, saturated, settings, backend="exact"), rtol=0, atol=1e-5
    )


def test_both_backends_agree_on_most_of_a_noisy_picture() -> None:
    """The lattice is an approximation; on noise about one pixel in ten may differ."""
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, probabilities = two_halves(20, 24)
    noise = torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(0))

    lattice, exact = (
        dense_crf(image, probabilities + 2 * noise, PARAMETERS["deeplab"], backend=backend)
        for backend in ("pydensecrf", "exact")
    )

    assert (lattice.argmax(0) == exact.argmax(0)).float().mean() > 0.85


def test_without_kernels_nothing_changes() -> None:
    image, probabilities = random_inputs()
    settings = replace(PARAMETERS["psa"], gaussian_weight=0, bilateral_weight=0)
    found = dense_crf(image, probabilities, settings, backend="exact")
    torch.testing.assert_close(found, probabilities / probabilities.sum(0), rtol=0, atol=1e-9)


def test_wrong_labels_are_outvoted_by_their_colour() -> None:
    image, probabilities = two_halves()
    probabilities[:, 3:5, 3:5] = probabilities[:, 3:5, 3:5].flip(0)
    found = dense_crf(image, probabilities, PARAMETERS["irn_labels"], backend="exact")
    assert found.argmax(0).tolist() == [[0] * 7 + [1] * 7] * 12


def test_one_label_is_certain() -> None:
    image, probabilities = random_inputs(labels=1)
    assert dense_crf(image, probabilities, PARAMETERS["psa"], backend="exact").eq(1).all()


def test_probabilities_of_labels() -> None:
    labels = torch.tensor([[0, 2]])
    wanted = torch.tensor([[[0.7, 0.15]], [[0.15, 0.15]], [[0.15, 0.7]]])
    torch.testing.assert_close(label_probabilities(labels, 3), wanted)
    torch.testing.assert_close(
        label_probabilities(labels[:, :1], 2, 0.9), torch.tensor([[[0.9]], [[0.1]]])
    )


def test_backgrounds() -> None:
    maps = torch.tensor([[[0.0, 0.25]], [[0.0, 0.75]]])
    assert with_background(maps, 0.5)[0].tolist() == [[0.5, 0.5]]
    assert with_background(maps, 2, power=True)[0].tolist() == [[1, 0.0625]]
    assert with_background(maps, 2, power=True)[1:].equal(maps)
    assert with_background(maps[:0], 2, power=True).tolist() == [[[1, 1]]]


def test_scores_keep_the_winner_in_float16() -> None:
    probabilities = torch.tensor([[1e-6, 0.5], [0.4, 0.3], [0.6, 0.2]])[..., None]
    scores = scores_against_background(probabilities).half()
    assert seed_mask(scores.float(), np.array([0, 1]), 0.5).tolist() == [[2], [0]]
    torch.testing.assert_close(scores[1, 0, 0].float(), torch.tensor(1.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("unary", ["constant", "power", "labels"])
@pytest.mark.parametrize("classes", [0, 1, 5])
def test_records(tmp_path: Path, unary: str, classes: int) -> None:
    image, _ = two_halves(13, 21)
    maps = np.zeros((classes, 4, 6), np.float16)
    maps[1:, :, 3:] = np.linspace(1, 0.6, max(classes - 1, 0))[:, None, None]
    seed = SeedRecord(3 * np.arange(classes), maps, (13, 21))
    refiner = CRF(unary=unary, unary_background=1 if unary == "power" else 0.4, backend="exact")

    save_seed(tmp_path / "a.npz", refiner.refine("a", Image.fromarray(image), seed))

    loaded = load_seed(tmp_path / "a.npz")
    assert loaded.maps.shape == (classes, 13, 21)
    assert loaded.full_size().shape == (classes, 13, 21)
    assert ((loaded.maps >= 0) & (loaded.maps <= 1)).all()
    wanted = np.zeros((13, 21), int)
    if classes > 1:
        wanted[:, 10:] = 4
    assert seed_mask(loaded.full_size(), loaded.keys, 0.5).tolist() == wanted.tolist()


def test_a_long_picture() -> None:
    pytest.importorskip("pydensecrf", reason="needs the extra 'crf'")
    image, _ = two_halves(33, 500)
    maps = np.zeros((1, 9, 125), np.float16)
    maps[..., 63:] = 0.9
    seed = SeedRecord(np.array([6]), maps, (33, 500))
    found = CRF().refine("a", Image.fromarray(image), seed)
    assert seed_mask(found.full_size(), found.keys, 0.5).tolist() == [[0] * 250 + [7] * 250] * 33


@pytest.mark.parametrize("score", [0.2, 0.45])
def test_the_background_equals_the_maps_where_their_own_masks_end(score: float) -> None:
    assert CRF(seed_background=score).unary_background == score
    refiner = CRF(seed_background=score, unary="power")
    background = with_background(
        torch.full((1, 2, 2), score, dtype=torch.float64), refiner.unary_background, power=True
    )
    assert background == pytest.approx(torch.full((2, 2, 2), score, dtype=torch.float64))
    assert refiner.background == 0.5


def test_inputs() -> None:
    settings = {
        "iterations": 2, "gaussian_sxy": 1, "gaussian_weight": 1,
        "bilateral_sxy": 9, "bilateral_srgb": 7, "bilateral_weight": 2,
    }  # fmt: skip
    refiner = CRF(parameters=settings, unary="labels", unary_background=0.3, backend="exact")
    assert refiner.parameters == CRFParameters(2, 1, 1, 9, 7, 2)
    assert refiner.inputs([]) == {
        "refiner": "CRF",
        "parameters": settings,
        "unary": "labels",
        "unary_background": 0.3,
        "image_mode": "raw",
        "backend": "exact",
    }


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^refiner\.parameters='none': choose from irn_labels"):
        CRF(parameters="none")
    with pytest.raises(InputError, match=r"^refiner\.parameters\.gaussian_sxy: .*required"):
        CRF(parameters={"iterations": 3})
    with pytest.raises(InputError, match=r"^refiner\.parameters\.iterations=-1: should be greater"):
        CRF(parameters={**asdict(PARAMETERS["psa"]), "iterations": -1})
    with pytest.raises(InputError, match=r"^refiner\.unary_background=2\.0: a score in 0\.\.1"):
        CRF(unary_background=2)
    assert CRF(unary="power", unary_background=2).unary_background == 2
    for wrong in ({"unary": "soft"}, {"backend": "fast"}, {"image_mode": "bgr"}):
        with pytest.raises(ValidationError):
            CRF(**wrong)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    with pytest.raises(InputError, match=r"pip install 'lpcam\[crf\]'.*backend=exact") as caught:
        CRF().inputs([])
    assert "\n" not in str(caught.value)


def test_wrapped_pixels() -> None:
    image = np.array([[[122, 116, 104], [117, 111, 99], [255, 0, 200]]], np.uint8)
    # -0.675 and -0.669 are cut to 0, -5.675, -5.669 and -5.008 to -5, which is 251.
    assert wrapped_pixels(image).tolist() == [[[0, 0, 0], [251, 251, 251], [132, 140, 95]]]


def test_the_picture_that_the_crf_sees() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (16, 20, 3), np.uint8))
    seed = SeedRecord(np.arange(2), random.random((2, 4, 5)).astype(np.float16), (16, 20))
    raw, wrapped = (
        CRF(backend="exact", image_mode=mode).refine("", picture, seed).maps
        for mode in ("raw", "legacy_wrap")
    )
    seen = Image.fromarray(wrapped_pixels(np.array(picture)))
    assert (wrapped == CRF(backend="exact").refine("", seen, seed).maps).all()
    assert (wrapped != raw).any()


def test_threads_change_nothing() -> None:
    """Pictures are refined several at a time."""
    pytest.importorskip("pydensecrf")
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (40 + i, 50, 3), np.uint8) for i in range(8)]
    seeds = [
        SeedRecord(np.arange(2), random.random((2, 10, 13)).astype(np.float16), image.shape[:2])
        for image in pictures
    ]

    def refine(i: int) -> np.ndarray:
        return CRF().refine("", Image.fromarray(pictures[i]), seeds[i]).maps

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(refine, range(8)))
    assert all((found == refine(i)).all() for i, found in enumerate(together))
