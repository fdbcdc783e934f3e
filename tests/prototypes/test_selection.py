import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from lpcam.errors import InputError
from lpcam.prototypes.centers import Centers, Clustering, fit_centers
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.local_features import split_features
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.prototypes.selection import Selection, class_score, select, select_prototypes
from lpcam.settings import make
from tests.oracles import prototypes as oracle
from tests.oracles.activation import class_activation_map, cosine, normalize_map

NAMES = ("cat", "dog", "cow")
CHANNELS = 8


@dataclass(frozen=True)
class Album:
    """Local features ``(h, w, D)`` half precision of some pictures, their labels, class weights."""

    locals: list[np.ndarray]
    labels: np.ndarray
    weight: Tensor

    @property
    def head(self) -> LinearHead:
        return LinearHead(self.weight)

    def read(self, index: int) -> np.ndarray:
        return self.locals[index]

    def plain_map(self, index: int, class_index: int) -> np.ndarray:
        features = self.locals[index].transpose(2, 0, 1)[None]
        weight = self.weight[class_index : class_index + 1].numpy()
        return normalize_map(class_activation_map(features, weight)[0, 0], 1e-5)


def random_album(seed: int, count: int = 9) -> Album:
    """Features scattered around eight orthogonal directions, positive, of several lengths."""
    rng = np.random.default_rng(seed)
    grids = []
    for _ in range(count):
        height, width = rng.integers(3, 7, 2)
        rows = np.eye(CHANNELS)[rng.integers(0, CHANNELS, (height, width))]
        rows = np.abs(rows + rng.normal(scale=0.05, size=rows.shape))
        grids.append((rows * rng.uniform(1, 5, (height, width, 1))).astype(np.float16))
    labels = np.zeros((count, 3), np.float32)
    labels[: count - 2, 0] = labels[2:, 1] = labels[::2, 2] = 1
    weight = torch.from_numpy(rng.normal(size=(3, CHANNELS)).astype(np.float32))
    return Album(grids, labels, weight)


@pytest.mark.parametrize("tau", [0.1, 0.45, 0.9])
@pytest.mark.parametrize("class_index", range(3))
def test_split_equals_the_slow_loop(class_index: int, tau: float) -> None:
    album = random_album(21)
    pictures = np.flatnonzero(album.labels[:, class_index]).tolist()
    sides = split_features(album.read, pictures, album.head, class_index, tau)
    expected = oracle.split(
        [album.locals[index].transpose(2, 0, 1) for index in pictures],
        [album.plain_map(index, class_index) for index in pictures],
        tau,
    )
    for side, rows in zip(sides, expected, strict=True):
        assert side.rows.dtype == torch.float16
        np.testing.assert_array_equal(side.rows.numpy(), rows.reshape(-1, CHANNELS))
        assert len(rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1.2))
def test_every_place_lands_on_exactly_one_side(seed: int, tau: float) -> None:
    album = random_album(seed, count=3)
    pictures = [2, 0]
    sides = split_features(album.read, pictures, album.head, 0, tau)
    found = []
    for side in sides:
        assert len(side.rows) == len(side.places)
        assert side.places.dtype == torch.int32
        for row, (index, y, x) in zip(side.rows, side.places.tolist(), strict=True):
            np.testing.assert_array_equal(row.numpy(), album.locals[index][y, x])
            found.append((index, y, x))
    everywhere = [(i, *place) for i in pictures for place in np.ndindex(album.locals[i].shape[:2])]
    assert sorted(found) == sorted(everywhere)


def test_what_reaches_tau_is_foreground() -> None:
    # The map is 4, 2, 1, 0 over a maximum of 4: in float32 the second is exactly 2 / 4.00001.
    local = np.array([[[4.0, 0], [2, 9], [1, 3], [-5, 2]]], np.float16)
    half = float(np.float32(2) / (np.float32(4) + np.float32(1e-5)))
    head = LinearHead(torch.tensor([[1.0, 0.0]]))

    def foreground(tau: float) -> list[int]:
        return split_features(lambda _: local, [0], head, 0, tau)[0].places[:, 2].tolist()

    assert foreground(half) == [0, 1]
    assert foreground(np.nextafter(np.float32(half), np.float32(1)).item()) == [0]
    assert foreground(0.5) == [0]  # the maximum has 1e-5 added, so a half falls just below
    assert foreground(1.0) == []
    assert foreground(0.0) == [0, 1, 2, 3]


def test_a_picture_that_the_class_does_not_excite_is_all_context() -> None:
    local = np.ones((2, 3, 2), np.float16)
    foreground, context = split_features(
        lambda _: local, [7], LinearHead(-torch.ones(1, 2)), 0, 0.1
    )
    assert foreground.rows.shape == (0, 2)
    assert foreground.places.shape == (0, 3)
    assert len(context.rows) == 6
    assert set(context.places[:, 0].tolist()) == {7}


def fit(album: Album, **options: object) -> Centers:
    given_options = {name: options.pop(name) for name in ("read_map", "chosen") if name in options}
    settings = Clustering(**{"k": 3, "activation": 0.3, **options})
    return fit_centers(
        album.read, album.labels, album.head, NAMES, settings, dim=CHANNELS, **given_options
    )


def side_rows(
    album: Album, class_index: int, side: int
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Places and features of one class and side, by the slow loops at tau 0.3."""
    found = []
    for index in np.flatnonzero(album.labels[:, class_index]).tolist():
        plain = album.plain_map(index, class_index)
        for y, x in np.ndindex(plain.shape):
            if (plain[y, x] < 0.3) == bool(side):
                found.append(((index, y, x), album.locals[index][y, x]))
    return found


@pytest.mark.parametrize("seed", [22, 23])
def test_centres_counts_and_nearest_by_brute_force(seed: int) -> None:
    album = random_album(seed)
    fitted = fit(album)
    assert fitted.centers.shape == (3, 2, 3, CHANNELS)
    assert fitted.nearest.shape == (3, 2, 3, 6, 3)
    short = 0
    for c, s in np.ndindex(3, 2):
        members: dict[int, list[tuple[float, tuple[int, ...], np.ndarray]]] = {0: [], 1: [], 2: []}
        centres = fitted.centers[c, s].double().numpy()
        for place, row in side_rows(album, c, s):
            similar = [cosine(row, centre) for centre in centres]
            j = int(np.argmax(similar))
            members[j].append((similar[j], place, row))
        for j, assigned in members.items():
            mean = np.mean([row for _, _, row in assigned], 0, dtype=np.float64)
            np.testing.assert_allclose(centres[j], mean, rtol=1e-4, atol=1e-4)
            assert fitted.counts[c, s, j] == len(assigned)
            best: dict[int, tuple[float, tuple[int, ...]]] = {}
            for similarity, place, _ in assigned:
                if place[0] not in best or similarity > best[place[0]][0]:
                    best[place[0]] = (similarity, place)
            ranked = [place for _, place in sorted(best.values(), reverse=True)][:6]
            short += len(ranked) < 6
            ranked += [(-1, -1, -1)] * (6 - len(ranked))
            assert fitted.nearest[c, s, j].tolist() == [list(place) for place in ranked]
    assert short < 18  # some cluster had more than six pictures to choose from


def test_each_class_is_fitted_on_its_own() -> None:
    album = random_album(24)
    fitted = fit(album)
    turned = Album(album.locals, album.labels[:, ::-1], album.weight.flip(0))
    settings = Clustering(k=3, activation=0.3)
    backwards = fit_centers(
        turned.read, turned.labels, turned.head, NAMES[::-1], settings, dim=CHANNELS
    )
    for name in ("centers", "counts", "nearest"):
        expected = getattr(fitted, name)
        torch.testing.assert_close(getattr(backwards, name).flip(0), expected, rtol=0, atol=0)
    assert not torch.equal(fitted.centers[0], fitted.centers[2])


def test_seed_of_the_clustering() -> None:
    album = random_album(25)
    torch.testing.assert_close(fit(album, seed=1).centers, fit(album, seed=1).centers)
    assert not torch.allclose(fit(album, seed=1).centers, fit(album, seed=2).centers)


def orthogonal(foreground: int, zeros: int = 0) -> Centers:
    """Two clusters after one step from a random start, for each of 40 seeds, stacked."""
    length = foreground + zeros + 1
    local = np.eye(length, dtype=np.float16)[: foreground + zeros]
    local[foreground:] = 0
    album = Album([local[None]], np.ones((1, 1), np.float32), torch.ones(1, length))
    # Every place reaches an activation of 0.
    options = {"k": 2, "activation": 0.0, "init": "random", "max_iter": 1, "allow_missing": True}
    found = [
        fit_centers(
            album.read,
            album.labels,
            album.head,
            ["thing"],
            Clustering(seed=seed, **options),
            dim=length,
        )
        for seed in range(40)
    ]
    names = ("centers", "counts", "nearest")
    return Centers(*(torch.stack([getattr(f, name)[0, 0] for f in found]) for name in names))


def test_random_start() -> None:
    # A feature that is orthogonal to both goes to the first: the second is where it started.
    found = orthogonal(8)
    assert (found.counts == torch.tensor([7, 1])).all()
    starts = [tuple(centre) for centre in found.centers[:, 1].tolist()]
    assert set(starts) == {tuple(row) for row in np.eye(9)[:8]}
    with pytest.raises(
        InputError, match=r"^prototypes\.init='first': should be 'k-means\+\+' or 'random'$"
    ):
        make(Clustering, {"init": "first"}, "prototypes.{}".format)
    with pytest.raises(ValidationError):
        fit(random_album(25), init="first")


def test_a_random_start_avoids_zero_features() -> None:
    assert (orthogonal(2, zeros=6).counts == 1).all()


def test_tolerance_stops_the_clustering() -> None:
    album = random_album(25)
    one = fit(album, max_iter=1).centers
    assert torch.equal(fit(album, tol=1e9).centers, one)
    assert not torch.equal(fit(album).centers, one)


def test_chosen_pictures_count_as_often_as_they_are_chosen() -> None:
    album = random_album(25)
    chosen = [[3, 3, 5], [2, 4, 6], [0, 2, 2]]
    fitted = fit(album, chosen=chosen)
    for c, pictures in enumerate(chosen):
        positions = sum(album.locals[index][..., 0].size for index in pictures)
        assert int(fitted.counts[c].sum()) == positions
        assert set(fitted.nearest[c, ..., 0].flatten().tolist()) <= {-1, *pictures}


@pytest.mark.parametrize("split", ["multi_scale", "single_view"])
def test_a_class_is_split_by_its_own_given_map(split: str) -> None:
    album = random_album(25)

    def read_map(index: int, class_index: int) -> np.ndarray:
        given = np.full(album.locals[index].shape[:2], 0.8, np.float32)
        given[0] = 0.1 * class_index
        return given

    fitted = fit(album, read_map=read_map, activation=0.2, k=1, split=split, allow_missing=True)
    for c in range(3):
        pictures = [album.locals[i] for i in np.flatnonzero(album.labels[:, c])]
        first_rows = sum(picture.shape[1] for picture in pictures)
        others = sum(picture[..., 0].size for picture in pictures) - first_rows
        # The third class's first rows have a map of exactly tau: over scales, as in the published
        # code, they are on neither side; of a single view, as in the paper, foreground.
        reach = c == 2 and split == "single_view"
        assert fitted.counts[c, 0, 0] == others + (first_rows if reach else 0)
        assert fitted.counts[c, 1, 0] == (0 if c == 2 else first_rows)


@pytest.mark.parametrize("split", ["multi_scale", "single_view"])
def test_the_split_of_the_published_code_is_strict_without_given_maps_too(split: str) -> None:
    album = random_album(25)
    fitted = fit(album, split=split, activation=0.0, k=1, allow_missing=True)
    for c in range(3):
        maps = [album.plain_map(index, c) for index in np.flatnonzero(album.labels[:, c])]
        positive = sum(int((values > 0).sum()) for values in maps)
        everywhere = sum(values.size for values in maps)
        assert 0 < positive < everywhere
        found = fitted.counts[c, :, 0].tolist()
        assert found == [everywhere if split == "single_view" else positive, 0]


def test_a_class_without_pictures_is_refused() -> None:
    album = random_album(26)
    album.labels[:, 1] = 0
    with pytest.raises(InputError, match=r"^class 'dog' has no picture .*allow_missing=true$"):
        fit(album)


def test_a_class_without_pictures_may_be_skipped() -> None:
    album = random_album(26)
    whole = fit(album)
    album.labels[:, 1] = 0
    fitted = fit(album, allow_missing=True)
    assert not fitted.centers[1].any()
    assert not fitted.counts[1].any()
    assert (fitted.nearest[1] == -1).all()
    for c in (0, 2):
        torch.testing.assert_close(fitted.centers[c], whole.centers[c], rtol=0, atol=0)

    chosen = select(fitted, album.head, NAMES, Selection(class_score=0.0, context_score=1.0))
    assert chosen.foreground[1].shape == chosen.context[1].shape == (0, CHANNELS)
    assert not chosen.directions()[1].any()
    assert chosen.directions()[[0, 2]].any(1).all()


@pytest.mark.parametrize(("given", "side"), [(0.0, "class"), (1.0, "context")])
def test_too_few_features_are_refused(given: float, side: str) -> None:
    album = random_album(27)

    def read_map(index: int, class_index: int) -> np.ndarray:
        return np.full(album.locals[index].shape[:2], given, np.float32)

    with pytest.raises(InputError) as caught:
        fit(album, read_map=read_map)
    message = str(caught.value)
    assert "'cat'" in message
    assert side in message
    assert "there are 0" in message
    assert "\n" not in message


def one_picture(foreground: int, context: int) -> Album:
    """A picture of so many features that the one class excites fully, and not at all."""
    length = foreground + context
    local = np.eye(length, dtype=np.float16)
    local[:foreground, 0] = 1
    return Album([local[None]], np.ones((1, 1), np.float32), torch.eye(length)[:1])


@pytest.mark.parametrize(("foreground", "context", "side"), [(2, 4, "class"), (4, 2, "context")])
def test_fewer_features_than_clusters(foreground: int, context: int, side: str) -> None:
    album = one_picture(foreground, context)

    def fit_one(*, allow_missing: bool) -> Centers:
        return fit_centers(
            album.read,
            album.labels,
            album.head,
            ["thing"],
            Clustering(k=3, activation=0.5, allow_missing=allow_missing),
            dim=foreground + context,
        )

    with pytest.raises(InputError, match=rf"'thing', {side}: k=3 .* there are 2; lower k, "):
        fit_one(allow_missing=False)
    fitted = fit_one(allow_missing=True)
    assert fitted.counts[0].sum(1).tolist() == [foreground, context]
    short = ("class", "context").index(side)
    assert fitted.counts[0, short].tolist() == [1, 1, 0]
    assert not fitted.centers[0, short, 2].any()
    assert (fitted.nearest[0, short, 2] == -1).all()


def test_centers_come_back_from_their_file(tmp_path: Path) -> None:
    fitted = fit(random_album(28))
    fitted.save(tmp_path / "centers.safetensors")
    loaded = Centers.load(tmp_path / "centers.safetensors")
    for name in ("centers", "counts", "nearest"):
        torch.testing.assert_close(getattr(loaded, name), getattr(fitted, name), rtol=0, atol=0)


def test_selection_is_strict() -> None:
    # Without weights both classes are equally probable: 0.5, exactly.
    centers, weight = torch.randn(3, CHANNELS), torch.zeros(2, CHANNELS)
    below, above = np.nextafter(np.float32(0.5), np.float32([0, 1])).tolist()
    for minimum, maximum, kept in (
        (None, None, True),
        (0.5, None, False),
        (below, None, True),
        (None, 0.5, False),
        (None, above, True),
        (below, above, True),
        (0.5, 0.5, False),
    ):
        keep = select_prototypes(centers, weight, 1, minimum=minimum, maximum=maximum)
        assert keep.tolist() == [kept] * 3


def test_selection_by_class_probability() -> None:
    generator = torch.Generator().manual_seed(29)
    centers = torch.randn(40, CHANNELS, generator=generator)
    weight = torch.randn(3, CHANNELS, generator=generator)
    for c in range(3):
        keep = select_prototypes(centers, weight, c, minimum=0.2, maximum=0.7)
        scores = [oracle.class_probability(x, weight.numpy(), c) for x in centers.numpy()]
        assert keep.tolist() == [0.2 < score < 0.7 for score in scores]
        assert 0 < keep.sum() < 40
        found = class_score(LinearHead(weight), centers, c)
        np.testing.assert_allclose(found.numpy(), scores, rtol=1e-5)


def by_score(foreground: list[list[float]], context: list[list[float]]) -> Centers:
    """Centres on one axis: with weights 1 and 0 their class probability is a logistic curve."""
    values = torch.tensor([foreground, context], dtype=torch.float32).transpose(0, 1)[..., None]
    shape = values.shape[:3]
    nearest = torch.full((*shape, 6, 3), -1, dtype=torch.int32)
    return Centers(values, torch.ones(shape, dtype=torch.int64), nearest)


AXIS = LinearHead(torch.tensor([[1.0], [0.0]]))
TWO = ("cat", "dog")


def test_select() -> None:
    # The cat's probability of x is s(x), the dog's s(-x): s(1) = 0.73, s(2) = 0.88, s(3) = 0.95.
    centers = by_score([[3, -1, 2, 1], [-3, 0, -1, -2]], [[-3, 3, -1, -2], [1, -2, 3, -1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = select(centers, AXIS, TWO, Selection(class_score=0.8, context_score=0.3))
    assert chosen.classes == TWO
    assert chosen.indices == (([0, 2], [0, 2, 3]), ([0, 3], [0, 2]))
    for c in range(2):
        for side, kept in ((0, chosen.foreground[c]), (1, chosen.context[c])):
            expected = centers.centers[c, side][chosen.indices[c][side]]
            torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    floor = select(
        centers, AXIS, TWO, Selection(class_score=0.8, context_score=0.3, context_floor=0.1)
    )
    assert floor.indices == (([0, 2], [2, 3]), ([0, 3], [0]))


def test_a_class_of_which_none_passes_keeps_its_best() -> None:
    centers = by_score([[-3, 1, 0], [-3, -2, -1]], [[-1, -1, -1], [1, 1, 1]])
    with pytest.warns(UserWarning, match=r"1 of 2 classes.*cat \(0\.731\)") as caught:
        chosen = select(centers, AXIS, TWO, Selection(class_score=0.75, context_score=0.5))
    (warning,) = caught
    assert "\n" not in str(warning.message)
    assert [kept for kept, _ in chosen.indices] == [[1], [0, 1]]
    assert chosen.foreground[0].tolist() == [[1.0]]


class BiasedHead(LinearHead):
    """A head that adds to the score of a dog."""

    def score(self, vectors: Tensor) -> Tensor:
        return super().score(vectors) + torch.tensor([0.0, 2.0])


def test_the_heads_own_score_selects() -> None:
    centers = by_score([[3, 1, 1.5], [1, 3, -3]], [[1, 3, 1.5], [-3, 1, 3]])
    settings = Selection(class_score=0.5, context_score=0.5)
    assert select(centers, AXIS, TWO, settings).indices == (([0, 1, 2], []), ([2], [1, 2]))
    chosen = select(centers, BiasedHead(AXIS.weight), TWO, settings)
    # The cat's probability of x is s(x - 2) now.
    assert chosen.indices == (([0], [0, 2]), ([0, 2], [2]))


def test_no_passing_prototype_may_be_an_error() -> None:
    centers = by_score([[-3, 1, 0], [-3, -2, -1]], [[-1, -1, -1], [1, 1, 1]])
    limits = {"class_score": 0.75, "context_score": 0.5}
    with pytest.raises(InputError, match=r"^class 'cat': .* 0\.75, the best one 0\.731; .*=best$"):
        select(centers, AXIS, TWO, Selection(fallback="error", **limits))
    with pytest.raises(
        InputError, match=r"^prototypes\.fallback='none': should be 'best' or 'error'$"
    ):
        make(Selection, {"fallback": "none", **limits}, "prototypes.{}".format)
    with pytest.raises(ValidationError):
        Selection(fallback="none", **limits)


def test_the_best_is_one_of_the_clusters_there_are() -> None:
    # Both real centres score below 0.5; the place of the third cluster is zero, which scores 0.5.
    centers = by_score([[-3, -1, 0], [-3, -2, 0]], [[-1, -1, 0], [1, 1, 0]])
    centers.counts[:, :, 2] = 0
    with pytest.warns(UserWarning, match=r"cat \(0\.269\)"):
        chosen = select(centers, AXIS, TWO, Selection(class_score=0.75, context_score=0.5))
    assert chosen.indices == (([1], [0, 1]), ([0, 1], [0, 1]))


def test_empty_clusters_are_never_kept() -> None:
    centers = by_score([[3, 2, 1], [-3, -2, -1]], [[-3, -2, -1], [3, 2, 1]])
    centers.counts[0, 0, 0] = centers.counts[1, 1, 2] = 0
    chosen = select(centers, AXIS, TWO, Selection(class_score=0.5, context_score=0.5))
    assert chosen.indices == (([1, 2], [0, 1, 2]), ([0, 1, 2], [0, 1]))


def test_without_context_prototypes_nothing_is_subtracted() -> None:
    album = random_album(30)
    fitted = fit(album)
    chosen = select(fitted, album.head, NAMES, Selection(class_score=0.0, context_score=0.0))
    assert [len(context) for context in chosen.context] == [0, 0, 0]
    both, alone = chosen.directions(), chosen.directions("class")
    torch.testing.assert_close(both, alone, rtol=0, atol=0)
    assert alone.any(1).all()
    assert not chosen.directions("context").any()


def hand_made() -> Prototypes:
    foreground = (torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]]))
    context = (torch.tensor([[0.0, 7.0], [-1.0, 0.0]]), torch.empty(0, 2))
    return Prototypes(TWO, foreground, context, (([4], [0, 2]), ([1, 3], [])))


def test_directions_of_both_sides_or_one() -> None:
    prototypes = hand_made()
    foreground = torch.tensor([[0.6, 0.8], [0.5, 0.5]])
    context = torch.tensor([[-0.5, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(prototypes.directions("class"), foreground)
    torch.testing.assert_close(prototypes.directions("context"), -context)
    torch.testing.assert_close(prototypes.directions("both"), foreground - context)
    torch.testing.assert_close(prototypes.directions(), foreground - context)
    with pytest.raises(InputError, match=r"^prototypes\.use=all: .*both, class or context$"):
        prototypes.directions("all")


def test_saved_tensors(tmp_path: Path) -> None:
    prototypes = hand_made()
    path = tmp_path / "prototypes.safetensors"
    prototypes.save(path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert len(tensors) == 4
    for side, expected in (("class", prototypes.foreground), ("context", prototypes.context)):
        for name, tensor in zip(TWO, expected, strict=True):
            (key,) = (key for key in tensors if key.endswith(f"{name}/{side}"))
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)
