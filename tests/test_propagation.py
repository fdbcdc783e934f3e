"""A step between a picture's own positions: against a slow statement of it, and what it must do."""

import pytest
import timm
import torch
import torch.nn.functional as F

from lpcam import LPCAM
from lpcam.errors import InputError
from lpcam.explain.feature_layers import find_finer_layer, finer_features
from lpcam.functional import normalize_maps, own_prototype_maps, propagate
from lpcam.models.backbones import build_backbone
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting, Propagation
from tests.oracles import propagation as oracle
from tests.prototypes.map_cases import SIZE, random_case


def scene(seed: int, *, maps: int = 2, grid=(3, 4), factor: int = 1):
    generator = torch.Generator().manual_seed(seed)
    fine = (grid[0] * factor, grid[1] * factor)
    values = torch.rand(maps, *fine, generator=generator, dtype=torch.float64)
    features = torch.randn(7, *grid, generator=generator, dtype=torch.float64).relu()
    stage = torch.randn(5, *fine, generator=generator, dtype=torch.float64)
    return values, features, stage


@pytest.mark.parametrize(("sharpness", "weight"), [(3.0, 2.0), (0.0, 1.0), (9.0, 0.0)])
def test_on_one_grid_it_is_the_formula(sharpness: float, weight: float) -> None:
    values, features, stage = scene(0)
    found = propagate(values, features, stage, sharpness=sharpness, stage_weight=weight)
    for one, value in zip(found, values, strict=True):
        wanted = oracle.step(value.numpy(), features.numpy(), stage.numpy(), sharpness, weight)
        torch.testing.assert_close(one, torch.from_numpy(wanted), rtol=1e-10, atol=1e-12)


def test_a_map_of_nothing_stays_one_whatever_the_features_signs() -> None:
    values, features, _ = scene(2)
    values[1] = 0
    found = own_prototype_maps(values, features - features.mean((1, 2), keepdim=True))
    assert found[0].amax() > 0.99
    assert not found[1].any()


def test_own_prototypes_are_the_formula() -> None:
    values, features, stage = scene(1)
    features[:, 0, 0] = 0  # has no direction
    found = own_prototype_maps(values, features)
    for one, value in zip(found, values, strict=True):
        wanted = torch.from_numpy(oracle.own_prototypes(value.numpy(), features.numpy()))
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)
    mixed = 0.7 * values + 0.3 * found
    options = {"sharpness": 3.0, "stage_weight": 2.0}
    torch.testing.assert_close(
        propagate(values, features, stage, own_share=0.3, **options),
        propagate(mixed, features, stage, **options),
    )


def test_blocks_change_nothing_and_maps_do_not_meet() -> None:
    values, features, stage = scene(2, maps=3, grid=(4, 5), factor=2)
    options = {"sharpness": 4.0, "stage_weight": 1.5, "own_share": 0.4}
    whole = propagate(values, features, stage, **options)
    assert whole.shape == (3, 8, 10)
    for block in (1, 45, 400):
        torch.testing.assert_close(
            propagate(values, features, stage, block=block, **options), whole
        )
    for index in range(3):
        alone = propagate(values[index : index + 1], features, stage, **options)
        torch.testing.assert_close(alone[0], whole[index])


def test_pictures_of_a_batch_do_not_meet() -> None:
    pictures = [scene(seed, factor=2) for seed in (4, 5, 6)]
    options = {"sharpness": 4.0, "stage_weight": 1.5, "own_share": 0.4, "block": 50}
    together = propagate(*(torch.stack(parts) for parts in zip(*pictures, strict=True)), **options)
    for found, picture in zip(together, pictures, strict=True):
        torch.testing.assert_close(found, propagate(*picture, **options))


def test_single_precision_is_near_double() -> None:
    values, features, stage = scene(3, grid=(5, 6), factor=2)
    options = {"sharpness": 3.0, "stage_weight": 2.0, "own_share": 0.4}
    double = propagate(values, features, stage, **options)
    single = propagate(values.float(), features.float(), stage.float(), **options)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_map_of_a_part_spreads_over_the_object_and_stops_at_its_edge() -> None:
    """Two regions, told apart by both kinds of features; the map has one corner of the first."""
    features = torch.zeros(2, 4, 8)
    features[0, :, :4], features[1, :, 4:] = 1, 1
    stage = torch.zeros(2, 8, 16)
    stage[0, :, :8], stage[1, :, 8:] = 1, 1
    values = torch.zeros(1, 8, 16)
    values[0, :2, :2] = 1
    found = propagate(values, features, stage, sharpness=10.0, stage_weight=2.0)[0]
    assert found[:, :7].min() > 10 * found[:, 9:].max()
    torch.testing.assert_close(found[:, :6], found[:1, :1].expand(8, 6), rtol=1e-3, atol=0)


def test_a_constant_map_stays_what_it_is() -> None:
    _, features, stage = scene(4, factor=2)
    constant = torch.full((1, 6, 8), 0.25, dtype=torch.float64)
    found = propagate(constant, features, stage, sharpness=5.0, stage_weight=1.0)
    torch.testing.assert_close(found, constant)


STEP = Propagation(sharpness=3.0, stage_weight=2.0, own_share=0.4)
FACTORS = (0.5, 1.0, 2.0)
LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()


def makers_case():
    case = random_case(21)
    stages = list(torch.randn(3, 5, 6, 8, generator=torch.Generator().manual_seed(5)))
    plain = case.setting("both")
    spread = MapSetting(plain.directions, plain.offset, STEP)
    return case, stages, plain, spread


def test_a_maker_propagates_what_it_would_have_made() -> None:
    case, stages, plain, spread = makers_case()
    make = MapMaker([MapSetting(), spread, plain], factors=FACTORS)
    cam, found, before = make(case.scales, LABELS, SIZE, stages=stages)
    (alone,) = MapMaker([plain])(case.scales, LABELS, SIZE)
    torch.testing.assert_close(before, alone)
    assert (cam != found).any()
    start = 0
    for picture, count in enumerate(LABELS.sum(1).tolist()):
        if not count:
            continue
        # Scale 1 and the larger one, each as the sum of its views, on the grid of scale 1.
        units = [F.normalize(v.features[:, picture].sum(0), dim=0) for v in case.scales[1:]]
        larger = F.interpolate(units[1][None], units[0].shape[1:], mode="bilinear")[0]
        wanted = propagate(
            alone[start : start + count],
            (units[0] + larger) / 2,
            stages[picture],
            sharpness=3.0,
            stage_weight=2.0,
            own_share=0.4,
        )
        wanted = normalize_maps(wanted - wanted.amin((1, 2), keepdim=True))
        wanted = F.interpolate(wanted[None], before.shape[1:], mode="bilinear")[0]
        torch.testing.assert_close(found[start : start + count], wanted, rtol=0, atol=1e-6)
        start += count


def test_batches_and_other_settings_change_nothing() -> None:
    case, stages, plain, spread = makers_case()
    softer = MapSetting(plain.directions, plain.offset, Propagation(1.0, 0.5, 0.0))
    make = MapMaker([spread, plain, softer], factors=FACTORS)
    together = make(case.scales, LABELS, SIZE, stages=stages)
    (alone,) = MapMaker([softer], factors=FACTORS)(case.scales, LABELS, SIZE, stages=stages)
    torch.testing.assert_close(together[2], alone, rtol=0, atol=1e-12)
    only = slice(2, 3)
    scales = [HostViews(v.features[:, only], v.maps[:, only]) for v in case.scales]
    single = make(scales, LABELS[only], SIZE, stages=stages[only])
    torch.testing.assert_close(together[0][2:], single[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "index"), [("efficientnet_lite0", 2), ("resnet50", 2), ("vit_tiny_patch16_224", None)]
)
def test_the_stage_is_the_last_with_twice_the_rows(name: str, index: int | None) -> None:
    backbone = build_backbone(name, None).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stage, features = backbone.stage(images), backbone(images)
        if index is None:  # no finer one: that of the block in the middle
            assert stage.shape[2:] == features.shape[2:]
            return
        assert stage.shape[2:] == (8, 12)
        torch.testing.assert_close(stage, backbone.stages(images)[index])
        torch.testing.assert_close(
            backbone.fused().stage(images), stage, rtol=1e-3, atol=1e-3 * float(stage.abs().max())
        )


@pytest.fixture(scope="module")
def fitted() -> LPCAM:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    images = torch.randn(6, 3, 64, 96, generator=generator)
    labels = torch.eye(3).repeat(2, 1)
    loader = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    return LPCAM(model, k=2, class_score=0.0, example=(3, 64, 96)).fit(loader, progress=False)


def test_the_library_propagates_too(fitted: LPCAM) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    views = ((0.5, False), (1.0, False), (1.0, True))
    plain = fitted(images, labels, views=views)
    found = fitted(images, labels, views=views, propagate=3)
    assert found.shape == plain.shape == (2, 3, 64, 96)
    assert not found[1].any()
    assert not found[0, 1].any()
    layer = find_finer_layer(fitted.model, fitted.layers, images)
    assert layer is fitted.model.layer3  # twice the rows of layer4
    stage = finer_features(fitted.model, layer, images)[0]
    with torch.no_grad():
        both = torch.cat([images[:1], images[:1].flip(3)])
        features = fitted.model.forward_features(both)
    added = features[0] + features[1].flip(2)
    unit = F.normalize(added, dim=0)
    wanted = propagate(
        plain[0, [0, 2]], unit, stage, sharpness=3.0, stage_weight=2.0, own_share=0.4
    )
    wanted = normalize_maps(wanted - wanted.amin((1, 2), keepdim=True))
    wanted = F.interpolate(wanted[None], (64, 96), mode="bilinear")[0]
    torch.testing.assert_close(found[0, [0, 2]], wanted, rtol=0, atol=1e-5)
    assert not fitted.model.layer3._forward_hooks


def test_positions_of_other_pictures_take_part_as_if_they_lay_beside() -> None:
    generator = torch.Generator().manual_seed(5)
    both, early = (torch.rand(d, 4, 6, generator=generator).double() for d in (7, 3))
    values = torch.rand(2, 4, 6, generator=generator).double()
    settings = {"sharpness": 4.0, "stage_weight": 1.5}
    # A picture of twice the width, cut into two that see each other.
    wanted = propagate(values, both, early, **settings)
    left, right = (
        [x[..., part] for x in (values, both, early)] for part in (slice(3), slice(3, 6))
    )
    torch.testing.assert_close(propagate(*left, beside=[right], **settings), wanted[..., :3])
    torch.testing.assert_close(propagate(*right, beside=[left], **settings), wanted[..., 3:])


def test_frames_of_a_video_meet(fitted: LPCAM) -> None:
    frame = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([[1, 0, 1]])
    alone = fitted(frame, labels, propagate=3)
    still = fitted(frame.repeat(4, 1, 1, 1), labels.repeat(4, 1), propagate=3, frames=2)
    torch.testing.assert_close(still, alone.repeat(4, 1, 1, 1), rtol=0, atol=1e-5)

    others = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(4)).flip(0)
    clip, shown = torch.cat([frame, others]), labels.repeat(4, 1)
    one = fitted(clip, shown, propagate=3, frames=1)
    assert not torch.allclose(one, fitted(clip, shown, propagate=3), atol=1e-3)
    # Frame 0 sees frame 1 alone.
    torch.testing.assert_close(one[0], fitted(clip[:2], shown[:2], propagate=3, frames=1)[0])
    with pytest.raises(InputError, match=r"^frames=1: give a number of frames, and propagate=3"):
        fitted(clip, shown, frames=1)


def test_what_cannot_propagate_says_so(fitted: LPCAM) -> None:
    images = torch.randn(1, 3, 64, 96)
    with pytest.raises(InputError, match=r"^propagate=-1: give a sharpness"):
        fitted(images, propagate=-1)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, global_pool="avg").eval()
    cam = LPCAM(vit, k=2, class_score=0.0)
    batch = (torch.randn(2, 3, 224, 224), torch.eye(2))
    cam.fit([batch], progress=False)
    with pytest.raises(InputError, match=r"^propagate: no layer before"):
        cam(batch[0], propagate=3)
