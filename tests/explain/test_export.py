from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lpcam import LPCAM
from lpcam.data.coco import CATEGORY_IDS, CLASSES
from lpcam.errors import InputError
from lpcam.explain.export import (
    MapModel,
    boxes,
    export_coco,
    export_onnx,
    export_program,
    save_masks,
)
from lpcam.seeds.palette import save_mask

OPTIONS = {
    "resnet18": {},
    "convnext_atto": {},
    "vit_little_patch16_reg4_gap_256": {"img_size": 64},
}


def fitted(name: str) -> LPCAM:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **OPTIONS[name])
    cam = LPCAM(model, k=2, signed="center", class_score=0.0, example=torch.randn(2, 3, 64, 64))
    images = torch.randn(4, 3, 64, 64)
    return cam.fit([(images, torch.eye(4))], progress=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_exported_graph_gives_the_same_maps(name: str) -> None:
    cam = fitted(name)
    images = torch.randn(3, 3, 64, 64)

    program = export_program(cam, images[:1])

    wanted = cam(images)
    torch.testing.assert_close(program.module()(images), wanted, rtol=0, atol=1e-5)
    assert wanted.any()
    assert cam.model.training
    assert not any(module._forward_hooks for module in cam.model.modules())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_the_step_is_part_of_the_exported_graph(name: str) -> None:
    cam = fitted(name)
    own = cam.prototypes.foreground
    cam.prototypes = replace(cam.prototypes, foreground=(own[0][:0], *own[1:]))
    images = torch.randn(3, 3, 64, 64)

    program = export_program(cam, images[:1], propagate=3)

    wanted = cam(images, propagate=3)
    found = program.module()(images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    # Without prototypes there is no map, and the step makes none.
    assert not found[:, 0].any()
    assert (wanted - cam(images)).abs().max() > 0.1


def test_a_model_without_a_finer_stage_has_no_step() -> None:
    cam = fitted("vit_little_patch16_reg4_gap_256")

    with pytest.raises(InputError, match="propagate: no layer before"):
        export_program(cam, torch.randn(1, 3, 64, 64), propagate=3)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("name", OPTIONS)
def test_torchscript_gives_the_same_maps(name: str, tmp_path: Path) -> None:
    cam = fitted(name)
    torch.jit.trace(MapModel(cam).eval(), torch.randn(2, 3, 64, 64)).save(tmp_path / "maps.pt")
    loaded = torch.jit.load(tmp_path / "maps.pt")

    for side in (64,) if name.startswith("vit") else (64, 96):
        images = torch.randn(3, 3, side, 64)
        maps = loaded(images)
        assert maps.any()
        torch.testing.assert_close(maps.detach(), cam(images), rtol=0, atol=1e-5)


# The warnings are onnxscript's and torch's own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "propagate"), [("resnet18", 3), ("vit_little_patch16_reg4_gap_256", 0)]
)
def test_onnxruntime_gives_the_same_maps(name: str, propagate: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    cam = fitted(name)
    path = tmp_path / "maps.onnx"

    assert export_onnx(cam, path, torch.randn(1, 3, 64, 64), propagate=propagate) < 1e-5

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64)
    (maps,) = session.run(["maps"], {"images": images.numpy()})
    wanted = cam(images, propagate=propagate).numpy()
    np.testing.assert_allclose(maps, wanted, rtol=0, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["maps.onnx"]


def test_masks(tmp_path: Path) -> None:
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, :, 0, 0] = torch.tensor([0.6, 0.9, 0.7])
    maps[0, :, 0, 1] = torch.tensor([0.6, 0.0, 0.4])
    maps[1, 1] = 1
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])

    save_masks(maps, labels, [tmp_path / "a.png", str(tmp_path / "b.png")])

    # The strongest class of those that the picture shows; class 1 is not among them.
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert (a.mode, np.asarray(a).tolist()) == ("P", [[3, 1], [0, 0]])
        assert np.asarray(b).tolist() == [[0, 0], [0, 0]]


def test_masks_need_a_label_and_a_file_each() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"maps of \(2, 3\), labels of \(2, 3\) and 1 paths"):
        save_masks(maps, torch.zeros(2, 3), ["a.png"])
    with pytest.raises(InputError, match=r"labels of \(2, 4\)"):
        save_masks(maps, torch.zeros(2, 4), ["a.png", "b.png"])
    with pytest.raises(InputError, match="300 classes do not fit"):
        save_masks(torch.zeros(1, 300, 2, 2), torch.zeros(1, 300), ["a.png"])


def test_boxes_by_hand() -> None:
    heat = torch.zeros(6, 8)
    heat[0, 0] = 0.9
    heat[2:5, 3:7] = 0.6
    heat[2, 3] = 0.8
    heat[5, 7] = 0.7  # touches the large part by a corner

    found, scores = boxes(heat)

    assert found.tolist() == [[3, 2, 8, 6], [0, 0, 1, 1]]
    np.testing.assert_allclose(scores, [(11 * 0.6 + 0.8 + 0.7) / 13, 0.9], rtol=1e-6)


def test_a_map_of_zero_has_no_box() -> None:
    found, scores = boxes(torch.zeros(3, 4))
    assert found.shape == (0, 4)
    assert scores.shape == (0,)


def parts(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts, corners included, by flooding from every pixel."""
    left = {(int(y), int(x)) for y, x in zip(*mask.nonzero(), strict=True)}
    found = []
    while left:
        part, queue = set(), [left.pop()]
        while queue:
            y, x = queue.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue.extend(near)
        found.append(part)
    return found


@given(hnp.arrays(np.float32, (6, 7), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_boxes_are_those_of_the_connected_parts(heat: np.ndarray) -> None:
    found, scores = boxes(torch.from_numpy(heat), 0.25)

    # No two parts have the same box: touching all its sides, they would meet.
    wanted = {}
    for part in parts(heat > 0.25):
        rows, columns = zip(*part, strict=True)
        box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
        wanted[box] = (len(part), sum(float(heat[place]) for place in part) / len(part))
    keys = [tuple(box) for box in found.tolist()]
    assert sorted(keys) == sorted(wanted)
    areas = [wanted[box][0] for box in keys]
    assert areas == sorted(areas, reverse=True)
    np.testing.assert_allclose(scores, [wanted[box][1] for box in keys], rtol=1e-5)


def test_coco_results_are_read_by_cocos_own_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs the extra 'coco'")
    masks = {
        "COCO_train2014_000000000042": np.array([[0, 1, 1], [3, 255, 1]], np.uint8),
        "000000000007": np.zeros((4, 5), np.uint8),
    }
    (tmp_path / "masks").mkdir()
    for name, mask in masks.items():
        save_mask(tmp_path / "masks" / f"{name}.png", mask)

    assert export_coco(tmp_path / "masks", tmp_path / "r.json", CATEGORY_IDS) == 2

    index = coco.COCO()
    index.dataset = {
        "images": [{"id": 42, "height": 2, "width": 3}, {"id": 7, "height": 4, "width": 5}],
        "categories": [{"id": category} for category in CATEGORY_IDS],
    }
    index.createIndex()
    results = index.loadRes(str(tmp_path / "r.json"))
    found = {
        a["category_id"]: results.annToMask(a).tolist() for a in results.dataset["annotations"]
    }
    assert found == {1: [[0, 1, 1], [0, 0, 1]], 3: [[0, 0, 0], [1, 0, 0]]}
    assert {a["image_id"] for a in results.dataset["annotations"]} == {42}


def test_the_80_category_ids() -> None:
    assert len(CATEGORY_IDS) == len(CLASSES)
    known = {"person": 1, "stop sign": 13, "dining table": 67, "toilet": 70, "toothbrush": 90}
    assert {name: CATEGORY_IDS[CLASSES.index(name)] for name in known} == known


def test_what_cannot_be_coco_results_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="needs the extra 'coco'")
    with pytest.raises(InputError, match="holds no mask"):
        export_coco(tmp_path, tmp_path / "r.json", [1])
    save_mask(tmp_path / "a_1.png", np.full((2, 2), 2, np.uint8))
    with pytest.raises(InputError, match=r"a_1\.png: holds 2, but there are 1 category ids"):
        export_coco(tmp_path, tmp_path / "r.json", [1])
    save_mask(tmp_path / "b_1.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match=r"b_1\.png: image id 1, which is also that of a_1\.png"):
        export_coco(tmp_path, tmp_path / "r.json", [1, 2])
    Image.new("RGB", (2, 2)).save(tmp_path / "b_1.png")
    (tmp_path / "a_1.png").unlink()
    with pytest.raises(InputError, match=r"b_1\.png: mask of mode RGB"):
        export_coco(tmp_path, tmp_path / "r.json", [1, 2])
    assert not (tmp_path / "r.json").exists()
