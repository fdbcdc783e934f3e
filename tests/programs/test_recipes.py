"""recipe=paper and recipe=code: their values, and every step against the slow implementations."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lpcam.evaluation import SegmentationScore
from lpcam.programs.build import settings
from lpcam.prototypes.centers import Centers, Clustering
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.kmeans import spherical_kmeans
from lpcam.prototypes.local_features import Draw, LocalFeatures, split_features
from lpcam.prototypes.maps import HostViews, MapMaker, MapSetting
from lpcam.prototypes.selection import Selection, select
from lpcam.seeds.masks import seed_mask
from lpcam.seeds.record import SeedRecord
from lpcam.stages.callbacks import FeatureCallback
from lpcam.stages.maps import Inference
from lpcam.storage.records import Records
from tests.conftest import ROOT
from tests.oracles import activation, kmeans, multiscale, prototypes, segmentation
from tests.oracles.interpolation import bilinear

BOTH = [(recipe, dataset) for recipe in ("paper", "code") for dataset in ("voc", "coco")]


@pytest.fixture(autouse=True)
def hydra_at_conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LPCAM_PROJECT", str(ROOT))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("program", ["train", "infer"])
@pytest.mark.parametrize(("recipe", "dataset"), BOTH)
def test_training_follows_the_published_recipe(program: str, recipe: str, dataset: str) -> None:
    cfg = compose(program, [f"recipe={recipe}", f"dataset={dataset}"])
    assert (cfg.backbone.name, cfg.backbone.weights) == ("resnet50", "imagenet")
    assert cfg.classifier == {
        "_target_": "lpcam.models.classifier.Classifier",
        "_partial_": True,
        "freeze_backbone": False,
        "freeze_stem": True,
        "epochs": 5,
        "validate_every": 1,
        "batch_size": 16,
        "optimizer": "sgd",
        "lr": 0.1,
        "head_lr_factor": 10,
        "momentum": 1e-4,
        "weight_decay": 1e-4,
        "poly_power": 0.9,
        "long_side": [320, 640],
        "crop": 512,
    }


# What the paper says and the published code does; see docs/recipes.md.
VALUES: dict[str, dict[tuple[str, str], Any]] = {
    "prototypes.k": {("paper", "voc"): 12, ("paper", "coco"): 20, ("code", "voc"): 12,
                     ("code", "coco"): 20},
    "prototypes.use": dict.fromkeys(BOTH, "both"),
    "prototypes.images_per_class": {("paper", "voc"): None, ("paper", "coco"): 100,
                                    ("code", "voc"): None, ("code", "coco"): 100},
    "prototypes.with_replacement": {**dict.fromkeys(BOTH, False), ("code", "coco"): True},
    "prototypes.split": {("paper", "voc"): "single_view", ("paper", "coco"): "single_view",
                         ("code", "voc"): "multi_scale", ("code", "coco"): "multi_scale"},
    "prototypes.init": {("paper", "voc"): "k-means++", ("paper", "coco"): "k-means++",
                        ("code", "voc"): "random", ("code", "coco"): "random"},
    "prototypes.tol": {("paper", "voc"): 1e-4, ("paper", "coco"): 1e-4, ("code", "voc"): 5,
                       ("code", "coco"): 5},
    "prototypes.fallback": {**dict.fromkeys(BOTH, "best"), ("code", "voc"): "error"},
    "thresholds.activation": {("paper", "voc"): 0.1, ("paper", "coco"): 0.25,
                              ("code", "voc"): 0.1, ("code", "coco"): 0.25},
    "thresholds.class_score": dict.fromkeys(BOTH, 0.9),
    "thresholds.context_score": {("paper", "voc"): 0.9, ("paper", "coco"): 0.5,
                                 ("code", "voc"): 0.9, ("code", "coco"): 0.5},
    "thresholds.context_floor": {("paper", "voc"): None, ("paper", "coco"): None,
                                 ("code", "voc"): 0.05, ("code", "coco"): 0},
    "thresholds.seed_background": dict.fromkeys(BOTH, 0.3),
    "inference.scales": {case: [0.5, 1.0, 1.5, 2.0] for case in BOTH},
    "inference.flip": dict.fromkeys(BOTH, True),
    "inference.eps": {("paper", "voc"): 1e-5, ("paper", "coco"): 1e-5, ("code", "voc"): 0,
                      ("code", "coco"): 0},
    "dataset.prototype_split": dict.fromkeys(BOTH, "train"),
    "dataset.train_split": {(recipe, name): {"voc": "train_aug", "coco": "train"}[name]
                            for recipe, name in BOTH},
}  # fmt: skip


def all_settings(cfg: DictConfig) -> tuple[Draw, Clustering, Selection, Inference]:
    """What infer.py makes of a config."""
    return (
        settings(Draw, cfg.prototypes),
        settings(Clustering, cfg.prototypes, cfg.thresholds),
        settings(Selection, cfg.thresholds, cfg.prototypes),
        settings(Inference, cfg.inference),
    )


@pytest.mark.parametrize(("recipe", "dataset"), BOTH)
def test_values(recipe: str, dataset: str) -> None:
    cfg = compose("infer", [f"recipe={recipe}", f"dataset={dataset}"])
    found = {name: OmegaConf.select(cfg, name) for name in VALUES}
    assert found == {name: by_case[recipe, dataset] for name, by_case in VALUES.items()}
    made: dict[str, Any] = {}
    for group in all_settings(cfg):
        made |= asdict(group)
    made["scales"] = list(made["scales"])
    elsewhere = ("use", "seed_background", "prototype_split", "train_split")
    for name, value in found.items():
        if name.split(".")[1] not in elsewhere:
            assert made[name.split(".")[1]] == value
    assert made["seed"] == cfg.prototypes.seed


@pytest.mark.parametrize("program", ["train", "infer"])
def test_the_command_line_wins(program: str) -> None:
    overrides = ["recipe=code", "dataset=coco", "classifier.lr=0.5", "prototypes.k=3"]
    cfg = compose(program, [*overrides, "backbone=efficientnet_lite0", "classifier=frozen"])
    assert (cfg.classifier.lr, cfg.prototypes.k) == (0.5, 3)
    assert cfg.backbone.name == "efficientnet_lite0"
    assert cfg.classifier.freeze_backbone
    assert cfg.thresholds.activation == 0.25


def test_other_data_gets_the_values_of_voc() -> None:
    names = ["prototypes", "thresholds", "inference", "classifier", "backbone"]
    for recipe in ("paper", "code"):
        folder, voc = (
            OmegaConf.masked_copy(compose("infer", [f"recipe={recipe}", f"dataset={name}"]), names)
            for name in ("folder", "voc")
        )
        assert folder == voc


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_studies_are_recipe_code_on_their_data(name: str) -> None:
    for program in ("train", "infer"):
        study = compose(program, [f"experiments={name}_lpcam"])
        recipe = compose(program, [f"dataset={name}", "recipe=code"])
        if name == "voc":
            recipe.dataset.map_splits = ["train_aug", "train"]
        assert OmegaConf.to_container(study) == OmegaConf.to_container(recipe)
        changed = compose(program, [f"experiments={name}_lpcam", "recipe=paper", "dataset.root=x"])
        assert changed.prototypes.get("split") == "single_view"
        assert changed.dataset.root == "x"


CLASSES, CHANNELS, SIZE = 3, 12, (33, 47)


@dataclass(frozen=True)
class Scene:
    """Features of pictures of one size at all scales and of their mirror images."""

    features: list[list[Tensor]]
    labels: np.ndarray
    weight: Tensor

    @property
    def head(self) -> LinearHead:
        return LinearHead(self.weight)

    def views(self, index: int) -> list[HostViews]:
        """What a classifier with these weights gives of a batch of one picture."""
        return [HostViews(v[:, None], self.head.own_maps(v)[:, None]) for v in self.features[index]]

    def doubles(self, index: int) -> list[np.ndarray]:
        return [views.double().numpy() for views in self.features[index]]


def random_scene(seed: int, scales: list[float], pictures: int = 44) -> Scene:
    """Positive features of any length around the directions of things that have their places."""
    rng = np.random.default_rng(seed)
    weight = np.full((CLASSES, CHANNELS), -0.4)
    weight[:, :CLASSES] += 1.4 * np.eye(CLASSES)
    weight += rng.normal(scale=0.1, size=weight.shape)
    labels = rng.random((pictures, CLASSES)) < 0.5
    labels[np.arange(pictures), rng.integers(0, CLASSES, pictures)] = True
    features = []
    for row in labels:
        shown = [*np.flatnonzero(row), 4, 5]
        things = rng.choice(shown, (3, 3))
        views = []
        for scale in scales:
            grid = [-(-round(side * scale) // 16) for side in SIZE]
            rows, columns = (np.arange(n) * 3 // n for n in grid)
            directions = np.eye(CHANNELS)[things[rows][:, columns]]
            values = np.abs(directions + rng.normal(scale=0.2, size=(2, *directions.shape)))
            values *= rng.uniform(1, 8, (2, *grid, 1))
            views.append(torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2))
        features.append(views)
    return Scene(features, labels, torch.from_numpy(weight.astype(np.float32)))


def write_features(scene: Scene, split: str, folder: Path) -> list[dict[str, np.ndarray]]:
    """What a features stage holds for each picture."""
    maps = split if split == "multi_scale" else None
    records = Records(folder)
    callback = FeatureCallback(records, local=True, maps=maps)
    files = []
    for index in range(len(scene.features)):
        batch = {
            "ids": [str(index)],
            "labels": torch.from_numpy(scene.labels[index : index + 1]).float(),
            "size": SIZE,
            "views": [],
            "flip": True,
        }
        half, whole, *larger = scene.views(index)
        prediction = [whole, half, *larger]
        callback.write_on_batch_end(None, None, prediction, None, batch, index, 0)
        with records.open(f"{index}.npz") as record, np.load(record) as file:
            files.append(dict(file))
    return files


def split_class(
    scene: Scene, files: list[dict[str, np.ndarray]], c: int, clustering: Clustering
) -> tuple[LocalFeatures, LocalFeatures]:
    """The two sides of a class, made by the program and compared with the slow loops."""
    sampled, tau = clustering.split == "multi_scale", clustering.activation
    places = scene.labels.cumsum(1) - 1
    pictures = np.flatnonzero(scene.labels[:, c]).tolist()
    sides = split_features(
        lambda index: files[index]["local"],
        pictures,
        scene.head,
        c,
        tau,
        read_map=(lambda index: files[index]["maps"][places[index, c]]) if sampled else None,
        strict=sampled,
    )
    maps, locals_ = [], []
    for index in pictures:
        local = files[index]["local"].transpose(2, 0, 1)
        np.testing.assert_allclose(local, scene.features[index][1][0].numpy(), rtol=1e-3)
        weight = scene.weight[c].numpy()
        if sampled:
            whole, *others = [scene.doubles(index)[i] for i in (1, 0, 2, 3)]
            plain = multiscale.sampled_plain_map([whole, *others], weight, SIZE)
            given = files[index]["maps"][places[index, c]]
            np.testing.assert_allclose(given, plain, rtol=0, atol=2e-6)
        else:
            cam = activation.class_activation_map(local[None].astype(np.float64), weight[None])
            plain = activation.normalize_map(cam[0, 0], 1e-5)
        maps.append(plain)
        locals_.append(local)
    for side, rows in zip(sides, prototypes.split(locals_, maps, tau), strict=True):
        np.testing.assert_array_equal(side.rows.numpy(), rows)
    return sides


@pytest.mark.parametrize(("recipe", "dataset"), BOTH)
def test_every_step_equals_the_slow_loops(recipe: str, dataset: str, tmp_path: Path) -> None:
    cfg = compose("infer", [f"recipe={recipe}", f"dataset={dataset}"])
    _, clustering, selection, inference = all_settings(cfg)
    k, background = clustering.k, cfg.thresholds.seed_background
    scene = random_scene(1, list(inference.scales))
    files = write_features(scene, clustering.split, tmp_path)

    centres = torch.zeros(CLASSES, 2, k, CHANNELS)
    for c in range(CLASSES):
        for s, side in enumerate(split_class(scene, files, c, clustering)):
            rows = side.rows.float().numpy()
            init = rows[:: len(rows) // k][:k]
            tol, most = clustering.tol, clustering.max_iter
            found = spherical_kmeans(
                side.rows, k, init=torch.from_numpy(init), max_iter=most, tol=tol
            )
            slow, labels, iterations = kmeans.cosine_kmeans(rows, init, tol, most)
            np.testing.assert_array_equal(found.labels.numpy(), labels)
            np.testing.assert_allclose(found.centers.numpy(), slow, rtol=0, atol=1e-5)
            assert found.n_iter == iterations
            centres[c, s] = found.centers

    fitted = Centers(
        centres,
        torch.ones(CLASSES, 2, k, dtype=torch.int64),
        torch.full((CLASSES, 2, k, 6, 3), -1, dtype=torch.int32),
    )
    chosen = select(fitted, scene.head, ["a", "b", "c"], selection)
    floor = -1 if selection.context_floor is None else selection.context_floor
    for c in range(CLASSES):
        scores = [
            [prototypes.class_probability(x, scene.weight.numpy(), c) for x in side.numpy()]
            for side in centres[c]
        ]
        kept = [j for j in range(k) if scores[0][j] > selection.class_score]
        context = [j for j in range(k) if floor < scores[1][j] < selection.context_score]
        assert chosen.indices[c] == (kept, context)
        assert kept
        assert context

    maker = MapMaker([MapSetting(), MapSetting(chosen.directions())], eps=inference.eps)
    score = SegmentationScore(CLASSES)
    counts = np.zeros((CLASSES + 1, CLASSES + 1), np.int64)
    rng = np.random.default_rng(2)
    for index in range(3):
        present = np.flatnonzero(scene.labels[index])
        labels = torch.from_numpy(scene.labels[index : index + 1])
        plain, lpcam = (maps.numpy() for maps in maker(scene.views(index), labels, SIZE))
        for place, c in enumerate(present):
            expected = multiscale.plain_map(scene.doubles(index), scene.weight[c].numpy(), SIZE)
            np.testing.assert_allclose(plain[place], expected, rtol=0, atol=2e-6)
            sides = (chosen.foreground[c].double().numpy(), chosen.context[c].double().numpy())
            expected = multiscale.prototype_map(
                scene.doubles(index), *sides, 0.0, SIZE, inference.eps
            )
            np.testing.assert_allclose(lpcam[place], expected, rtol=0, atol=2e-6)

        seed = SeedRecord(present, lpcam.astype(np.float16), SIZE)
        mask = seed_mask(seed.full_size(), present, background)
        slow_maps = np.stack([bilinear(values.astype(np.float64), SIZE) for values in seed.maps])
        slow = segmentation.seed_mask(slow_maps, present.tolist(), background)
        np.testing.assert_array_equal(mask, slow)
        truth = rng.choice([0, 1, 2, 3, 255], SIZE).astype(np.uint8)
        score.update(seed.full_size(), present, truth)
        counts += segmentation.confusion(truth, slow, CLASSES)
    result = score.compute()
    at = result.index(background)
    assert result.thresholds[at] == background
    np.testing.assert_array_equal(result.confusion[at], counts)
    assert result.miou[at] == pytest.approx(segmentation.scores(counts)["miou"], abs=1e-12)
