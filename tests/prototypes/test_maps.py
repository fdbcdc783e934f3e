import numpy as np
import pytest
import torch
from torch import Tensor

from lpcam.functional import local_prototype_map, prototype_directions
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, sampled_maps
from tests.oracles import activation, multiscale
from tests.oracles.interpolation import bilinear
from tests.prototypes.map_cases import CHANNELS, CLASSES, SIZE, Case, host_views, random_case

GRID = (10, 13)
LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
EVERY_KIND = (["cam"], ["both"], ["cam", "context", "both"])


def maker(case: Case, *kinds: str) -> MapMaker:
    return MapMaker([case.setting(kind) for kind in kinds])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["cam", "both", "class", "context"])
def test_maps_equal_the_slow_loops(kind: str, views: int) -> None:
    case = random_case(11, views)
    (maps,) = maker(case, kind)(case.scales, LABELS, SIZE)
    shown = LABELS.nonzero().tolist()
    assert maps.shape == (len(shown), *GRID)
    for found, (picture, class_index) in zip(maps, shown, strict=True):
        expected = case.expected(kind, picture, class_index)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=5e-6)
        assert expected.max() > 0.99


def test_plain_cam_rectifies_views_and_lpcam_adds_their_features() -> None:
    # One place; the mirror image has twice the opposite feature.
    features = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).view(2, 1, 2, 1, 1)
    labels = torch.ones(1, 2).bool()
    scales = host_views([features], torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
    settings = [MapSetting(), MapSetting(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))]
    maps = torch.stack(MapMaker(settings)(scales, labels, (4, 4)))[:, :, 0, 0]
    # CAM: max(3, 0) + max(-6, 0) = 3 and 0 + 6; LPCAM: cosine of (1, 0) + (-2, 0) = (-1, 0).
    expected = [[3 / (3 + 1e-5), 6 / (6 + 1e-5)], [0.0, 1 / (1 + 1e-5)]]
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-6)


def test_scales_are_added_before_the_division() -> None:
    features = [
        torch.tensor([[3.0, 0.0]]).view(1, 1, 1, 1, 2),
        torch.tensor([[0.0, 4.0]]).view(1, 1, 1, 1, 2),
    ]
    scales = host_views(features, torch.ones(1, 1))
    (maps,) = MapMaker([MapSetting()])(scales, torch.ones(1, 1).bool(), (1, 8))
    np.testing.assert_allclose(maps[0].numpy(), [[3 / (4 + 1e-5), 4 / (4 + 1e-5)]], rtol=1e-6)


@pytest.mark.parametrize("size", [(37, 50), (48, 80), (33, 1)])
def test_sampled_maps_equal_the_slow_loops(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(18)
    grids = [(-(-size[0] // cell), -(-size[1] // cell)) for cell in (16, 32, 8)]
    features = [torch.randn(2, CHANNELS, *grid, generator=generator) for grid in grids]
    weight = torch.randn(3, CHANNELS, generator=generator)
    rectified = [LinearHead(weight).own_maps(views) for views in features]

    found = sampled_maps(rectified, size)

    assert found.shape == (3, *grids[0])
    scales = [views.double().numpy() for views in features]
    for ours, row in zip(found.numpy(), weight.double().numpy(), strict=True):
        expected = multiscale.sampled_plain_map(scales, row, size)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    assert sampled_maps([maps[:, :0] for maps in rectified], size).shape == (0, *grids[0])


def test_sampled_maps_read_corners_of_the_full_size_map() -> None:
    # One scale, one view: the map rises from 1 to 3 between the centres of two cells.
    found = sampled_maps([torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)], (16, 32))[0, 0]
    # Pixel 16 lies 8.5 pixels after the first centre, of 16; a mean of its cell would be 2.7 or so.
    torch.testing.assert_close(found, torch.tensor([1.0, 1 + 2 * 8.5 / 16]) / (3 + 1e-5))


@pytest.mark.parametrize(
    "kinds",
    [("cam", "both", "context", "class"), ("both", "cam", "context", "cam", "class", "cam")],
)
def test_settings_together_equal_settings_alone_in_their_order(kinds: tuple[str, ...]) -> None:
    case = random_case(12)
    together = maker(case, *kinds)(case.scales, LABELS, SIZE)
    assert len(together) == len(kinds)
    for maps, kind in zip(together, kinds, strict=True):
        assert maps.shape == (int(LABELS.sum()), *GRID)
        (alone,) = maker(case, kind)(case.scales, LABELS, SIZE)
        torch.testing.assert_close(maps, alone, rtol=0, atol=1e-6)
    for i, maps in enumerate(together):
        same = [torch.equal(maps, other) for other in together]
        assert same == [kind == kinds[i] for kind in kinds]


@pytest.mark.parametrize("kinds", EVERY_KIND)
def test_a_batch_equals_its_pictures_one_at_a_time(kinds: list[str]) -> None:
    case = random_case(13)
    make = maker(case, *kinds)
    together = torch.stack(make(case.scales, LABELS, SIZE))
    first = 0
    for picture in (0, 2):
        only = slice(picture, picture + 1)
        scales = [HostViews(v.features[:, only], v.maps[:, only]) for v in case.scales]
        alone = torch.stack(make(scales, LABELS[only], SIZE))
        last = first + int(LABELS[picture].sum())
        torch.testing.assert_close(together[:, first:last], alone, rtol=0, atol=1e-6)
        first = last
    assert first == together.shape[1]


@pytest.mark.parametrize("kinds", EVERY_KIND)
def test_pictures_without_labels_get_no_map(kinds: list[str]) -> None:
    case = random_case(14)
    maps = maker(case, *kinds)(case.scales, torch.zeros(3, CLASSES).bool(), SIZE)
    assert [found.shape for found in maps] == [(0, *GRID)] * len(kinds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_maps_of_features_on_another_device() -> None:
    case = random_case(15)
    make = maker(case, "cam", "both", "context")
    expected = torch.stack(make(case.scales, LABELS, SIZE))
    scales = [HostViews(v.features.cuda(), v.maps.cuda()) for v in case.scales]
    device = scales[0].features.device
    found = torch.stack(make.move(device)(scales, LABELS.cuda(), SIZE))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


def test_without_eps_the_maximum_is_one() -> None:
    """That of LPCAM: plain CAM is divided by its maximum and 1e-5, in the published code too."""
    case = random_case(19)
    make = MapMaker([case.setting("cam"), case.setting("both")], eps=0)
    plain, lpcam = make(case.scales, LABELS, SIZE)
    assert (lpcam.amax((1, 2)) == 1).all()
    assert (plain.amax((1, 2)) < 1).all()
    zero = host_views([torch.zeros_like(views) for views in case.features], case.weight)
    assert not torch.stack(make(zero, LABELS, SIZE)).any()


def test_without_context_positive_features_need_no_relu() -> None:
    """The published code leaves it out there; features after a ReLU make no negative cosine."""
    case = random_case(20)
    features = [views.abs() for views in case.features]
    foreground = [vectors.abs() for vectors in case.prototypes.foreground]
    directions = prototype_directions(foreground, [vectors[:0] for vectors in foreground])
    for views in features:
        assert (local_prototype_map(views.sum(0), directions) >= 0).all()


def test_lpcam_needs_no_maps_of_the_host() -> None:
    case = random_case(21)
    make = maker(case, "both", "context")
    alone = make([HostViews(views) for views in case.features], LABELS, SIZE)
    for found, expected in zip(alone, make(case.scales, LABELS, SIZE), strict=True):
        assert torch.equal(found, expected)


def test_maps_of_classes_that_no_label_names_may_be_anything() -> None:
    case = random_case(22)
    make = maker(case, "cam")
    (expected,) = make(case.scales, LABELS, SIZE)
    shown = LABELS[None, :, :, None, None]
    for other in (0.0, 1e4):
        scales = [v._replace(maps=v.maps.where(shown, other)) for v in case.scales]
        assert torch.equal(make(scales, LABELS, SIZE)[0], expected)


def test_rounded_features_give_the_maps_that_the_stored_ones_give() -> None:
    case = random_case(23)
    settings = [case.setting("both"), case.setting("context")]
    rounded = MapMaker(settings, rounded=True)
    now = rounded(case.scales, LABELS, SIZE)
    stored = [HostViews(views.sum(0, keepdim=True).half()) for views in case.features]
    for make in (rounded, MapMaker(settings)):
        for found, expected in zip(make(stored, LABELS, SIZE), now, strict=True):
            assert torch.equal(found, expected)
    precise = MapMaker(settings)(case.scales, LABELS, SIZE)
    assert not any(torch.equal(a, b) for a, b in zip(now, precise, strict=True))


def times_extra(maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
    """Each class's map times the factors ``(B, C, h, w)`` that the host gives of its scale."""
    assert maps.shape[2] == len(classes)
    return maps * views.extra[:, classes]


@pytest.mark.parametrize("kinds", [("both", "cam", "context"), ("cam", "class", "cam"), ("cam",)])
def test_what_the_host_finishes_is_lpcam_at_each_scale(kinds: tuple[str, ...]) -> None:
    case = random_case(24)
    generator = torch.Generator().manual_seed(25)
    factors = [
        torch.rand(3, CLASSES, *views.shape[-2:], generator=generator, dtype=torch.float64) + 0.1
        for views in case.features
    ]
    scales = [v._replace(extra=extra) for v, extra in zip(case.scales, factors, strict=True)]

    found = maker(case, *kinds)(scales, LABELS, SIZE, times_extra)

    unfinished = maker(case, *kinds)(scales, LABELS, SIZE)
    for kind, maps, before in zip(kinds, found, unfinished, strict=True):
        if kind == "cam":
            assert torch.equal(maps, before)
            continue
        assert not torch.allclose(maps, before, rtol=0, atol=0.01)
        for values, (picture, class_index) in zip(maps, LABELS.nonzero().tolist(), strict=True):
            foreground, context, offset = case.sides(kind, class_index)
            total = np.zeros(GRID)
            for views, extra in zip(case.features, factors, strict=True):
                added = views[:, picture].double().numpy().sum(0)
                signed = activation.local_prototype_map(added[None], [foreground], [context])
                rectified = np.maximum(signed[0, 0] + offset, 0)
                total += bilinear(rectified * extra[picture, class_index].numpy(), GRID)
            expected = activation.normalize_map(total, 1e-5)
            np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=5e-6)


def test_finishing_sees_every_class_that_some_picture_shows() -> None:
    case = random_case(26)
    seen = []

    def finish(maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        assert (maps >= 0).all()
        assert not maps.sum((1, 3, 4)).eq(0).any()
        seen.append((maps.shape, classes.tolist()))
        return maps

    labels = LABELS.clone()
    labels[:, 1] = False
    maker(case, "both", "cam", "class")(case.scales, labels, SIZE, finish)
    grids = [views.shape[-2:] for views in case.features]
    assert seen == [((2, 3, 3, *grid), [0, 2, 3]) for grid in grids]
