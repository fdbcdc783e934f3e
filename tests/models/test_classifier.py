from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pydantic import ValidationError
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lpcam.data.loaders import pooled_loader
from lpcam.models.backbones import Backbone, build_backbone
from lpcam.models.classifier import Classifier

CLASSES = 3
CHANNELS = 96


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(3)
    return build_backbone("test_resnet", None)


@dataclass(frozen=True)
class Step:
    """What one optimiser step saw."""

    global_step: int
    rates: dict[str, float]
    head: Tensor
    batch: Any


class Recorder(pl.Callback):
    """Writes down learning rates and weights before each step, and the loss of each."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.losses: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = trainer.optimizers[0].param_groups
        rates = {
            name: group["lr"]
            for name, parameter in pl_module.named_parameters()
            for group in groups
            if any(parameter is p for p in group["params"])
        }
        head = pl_module.head.weight.detach().clone()
        self.steps.append(Step(trainer.global_step, rates, head, batch))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def make_trainer(*callbacks: pl.Callback, epochs: int = 2) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def picture_loader(count: int = 6, batch_size: int = 2) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    labels = (torch.rand(count, CLASSES, generator=generator) < 0.5).float()
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def mean_features(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    pooled = rng.gamma(0.5, size=(count, CHANNELS)).astype(np.float32)
    return pooled, (rng.random((count, CLASSES)) < 0.5).astype(np.float32)


def feature_loader(count: int = 6, batch_size: int = 2) -> DataLoader[tuple[Tensor, ...]]:
    return pooled_loader(*mean_features(count), batch_size=batch_size, shuffle=False)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-scores))


def margin_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over pictures and classes of -y log s(x) - (1 - y) log(1 - s(x))."""
    right = sigmoid(scores) ** labels * (1 - sigmoid(scores)) ** (1 - labels)
    return float(-np.log(right).mean())


def test_pictures_score_like_their_mean_features(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        local = backbone(images)
        scores = classifier(images)
        pooled = local.mean((2, 3))
        torch.testing.assert_close(classifier(pooled), scores)
    grids = local.double().numpy()
    for b, c in np.ndindex(2, CLASSES):
        weight = classifier.weight[c].double().numpy()
        # The mean of the scores of the places is the score of their mean.
        everywhere = [weight @ grids[b, :, y, x] for y, x in np.ndindex(grids.shape[2:])]
        assert float(scores[b, c]) == pytest.approx(np.mean(everywhere), abs=1e-4)
    assert classifier.weight.shape == (CLASSES, CHANNELS)
    assert not classifier.weight.requires_grad


def test_loss_is_the_multi_label_soft_margin(backbone: Backbone) -> None:
    recorder = Recorder()
    make_trainer(recorder).fit(
        Classifier(backbone, CLASSES, freeze_backbone=True), feature_loader()
    )
    assert len(recorder.losses) == 6
    for step, loss in zip(recorder.steps, recorder.losses, strict=True):
        x, labels = (part.double().numpy() for part in step.batch)
        assert loss == pytest.approx(margin_loss(x @ step.head.double().numpy().T, labels), 1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rates_fall_polynomially_step_by_step(backbone: Backbone, optimizer: str) -> None:
    recorder = Recorder()
    classifier = Classifier(backbone, CLASSES, optimizer=optimizer, lr=0.01)
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}

    trainer = make_trainer(recorder)
    trainer.fit(classifier, picture_loader())

    assert [step.global_step for step in recorder.steps] == list(range(6))
    for index, step in enumerate(recorder.steps):
        rate = 0.01 * (1 - index / 6) ** 0.9
        assert step.rates.keys() == before.keys()
        for name, found in step.rates.items():
            assert found == pytest.approx(10 * rate if name == "head.weight" else rate)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    assert type(trainer.optimizers[0]) is kind
    for name in ("head.weight", "backbone.network.conv1.0.weight"):
        assert not torch.equal(dict(classifier.named_parameters())[name], before[name])


@pytest.mark.parametrize("validate", [False, True])
def test_fine_tuning_leaves_batch_norm_statistics_alone(backbone: Backbone, validate: bool) -> None:
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    classifier = Classifier(backbone, CLASSES)
    make_trainer().fit(classifier, picture_loader(), picture_loader() if validate else None)
    for name, value in backbone.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_schedule_settings(backbone: Backbone) -> None:
    recorder = Recorder()
    classifier = Classifier(backbone, CLASSES, lr=0.02, head_lr_factor=3.0, poly_power=2.0)
    make_trainer(recorder, epochs=1).fit(classifier, picture_loader(8))
    rates = [
        (s.rates["head.weight"], s.rates["backbone.network.fc.weight"]) for s in recorder.steps
    ]
    factors = [1, 9 / 16, 1 / 4, 1 / 16]
    np.testing.assert_allclose(rates, [(0.06 * f, 0.02 * f) for f in factors])


def head_gradient(weight: np.ndarray, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Derivative of the loss: each class's (s(x) - y) times the feature, averaged."""
    return (sigmoid(x @ weight.T) - labels).T @ x / labels.size


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_steps_of_the_optimizer_by_hand(backbone: Backbone, optimizer: str) -> None:
    recorder = Recorder()
    classifier = Classifier(
        backbone,
        CLASSES,
        optimizer=optimizer,
        lr=0.003,
        momentum=0.8,
        weight_decay=0.05,
        freeze_backbone=True,
    )
    make_trainer(recorder, epochs=1).fit(classifier, feature_loader(6))
    weight = recorder.steps[0].head.double().numpy()
    first = second = np.zeros_like(weight)
    for index in range(2):
        x, labels = (part.double().numpy() for part in recorder.steps[index].batch)
        gradient = head_gradient(weight, x, labels)
        rate = 0.03 * (1 - index / 3) ** 0.9
        if optimizer == "sgd":
            first = 0.8 * first + gradient + 0.05 * weight
            weight = weight - rate * first
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            mean, square = first / (1 - 0.9 ** (index + 1)), second / (1 - 0.999 ** (index + 1))
            weight = weight * (1 - rate * 0.05) - rate * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(recorder.steps[index + 1].head.numpy(), weight, atol=2e-5)


@pytest.mark.parametrize("loader", [feature_loader, picture_loader])
def test_frozen_backbone_never_changes(
    backbone: Backbone, loader: Callable[[], DataLoader[tuple[Tensor, ...]]]
) -> None:
    recorder = Recorder()
    classifier = Classifier(backbone, CLASSES, freeze_backbone=True)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}

    make_trainer(recorder).fit(classifier, loader())

    assert {tuple(step.rates) for step in recorder.steps} == {("head.weight",)}
    after = classifier.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed == ["head.weight"]


def test_a_frozen_stem_never_changes(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES, lr=0.1, freeze_stem=True)
    before = {name: value.clone() for name, value in classifier.named_parameters()}
    pictures = TensorDataset(torch.randn(4, 3, 32, 32), torch.ones(4, CLASSES))
    make_trainer(epochs=1).fit(classifier, DataLoader(pictures, batch_size=2))
    same = {
        name
        for name, value in classifier.named_parameters()
        if torch.equal(before[name], value) and ".fc." not in name  # timm's own head has no part
    }
    first = [name for name, _ in backbone.network.named_parameters()][:3]
    assert same == {f"backbone.network.{name}" for name in first}
    assert before[f"backbone.network.{first[0]}"].ndim == 4


def test_unknown_optimizer_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ValidationError, match="should be 'sgd' or 'adamw'"):
        Classifier(backbone, CLASSES, optimizer="lion")


def test_validation_scores_cover_the_whole_split(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES)
    pooled, labels = mean_features(11)
    loader = pooled_loader(pooled, labels, batch_size=4, shuffle=False)

    (found,) = make_trainer().validate(classifier, loader, verbose=False)

    scores = pooled.astype(np.float64) @ classifier.weight.double().numpy().T
    assert found["val/loss"] == pytest.approx(margin_loss(scores, labels), rel=1e-5)
    expected = average_precision_score(labels, scores, average="macro")
    assert found["val/map"] == pytest.approx(expected, abs=1e-5)
    f1 = []
    for truth, guess in zip(labels.T > 0, scores.T > 0, strict=True):
        hits = (truth & guess).sum()
        f1.append(2 * hits / (truth.sum() + guess.sum()))
    assert found["val/f1"] == pytest.approx(np.mean(f1), abs=1e-5)
    assert 0 < expected < 1
    assert 0 < np.mean(f1) < 1


class KilledError(Exception):
    pass


class KillInSecondEpoch(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.current_epoch == 1:
            raise KilledError


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_on_from_a_checkpoint(tmp_path: Path, optimizer: str, validate: bool) -> None:
    def build() -> Classifier:
        torch.manual_seed(4)
        network = build_backbone("test_resnet", None)
        return Classifier(network, CLASSES, optimizer=optimizer, lr=0.01, freeze_backbone=True)

    loaders = [feature_loader()] * (1 + validate)
    whole, resumed = build(), build()
    reference = Recorder()
    make_trainer(reference, epochs=3).fit(whole, *loaders)
    checkpoint = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    victim = make_trainer(checkpoint, KillInSecondEpoch(), epochs=3)
    with pytest.raises(KilledError):
        victim.fit(build(), *loaders)
    path = tmp_path / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 3
    assert state["state_dict"].keys() == whole.state_dict().keys()

    recorder = Recorder()
    trainer = make_trainer(recorder, epochs=3)
    trainer.fit(resumed, *loaders, ckpt_path=str(path), weights_only=True)

    assert [step.global_step for step in recorder.steps] == list(range(3, 9))
    for ours, theirs in zip(recorder.steps, reference.steps[3:], strict=True):
        assert ours.rates == pytest.approx(theirs.rates)
        torch.testing.assert_close(ours.head, theirs.head, rtol=0, atol=0)
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)


def test_own_maps_are_plain_cam_and_scores_have_no_bias(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES)
    features, vectors = torch.randn(2, CHANNELS, 2, 3), torch.randn(4, CHANNELS)
    weight = classifier.weight.double().numpy()
    maps = np.einsum("cd,bdyx->bcyx", weight, features.double().numpy()).clip(0)
    np.testing.assert_allclose(classifier.own_maps(features).numpy(), maps, atol=1e-5)
    some = classifier.own_maps(features, torch.tensor([2, 0])).numpy()
    np.testing.assert_allclose(some, maps[:, [2, 0]], atol=1e-5)
    scores = vectors.double().numpy() @ weight.T
    np.testing.assert_allclose(classifier.score(vectors).numpy(), scores, atol=1e-5)


def test_keys_tell_what_decides_features_and_scores(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES)
    feature_key, score_key = classifier.feature_key, classifier.score_key
    assert Classifier(backbone, CLASSES).score_key != score_key  # other random weights
    classifier.head.weight.data[1, 5] += 1e-4
    assert classifier.feature_key == feature_key
    assert classifier.score_key != score_key
    score_key = classifier.score_key
    backbone.network.conv1[0].weight.data[0, 0, 0, 0] += 1e-4
    assert classifier.feature_key != feature_key
    feature_key = classifier.feature_key
    classifier.precision = "16-mixed"
    assert classifier.feature_key != feature_key
    assert classifier.score_key == score_key


def test_the_copy_for_inference_gives_the_same(backbone: Backbone) -> None:
    classifier = Classifier(backbone, CLASSES).eval()
    twin = classifier.for_inference()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), classifier(images), rtol=1e-4, atol=1e-5)
    assert not twin.training
    assert twin.score_key == classifier.score_key
