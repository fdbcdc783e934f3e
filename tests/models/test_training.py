import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lpcam.errors import InputError
from lpcam.models.training import fit, per_process, polynomial
from tests.malice import Malicious
from tests.refiners.learning import trainer_maker


class Line(pl.LightningModule):
    """Learns a line; remembers the rates of every step."""

    def __init__(self, power: float = 0.9) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.other = nn.Linear(3, 1), nn.Linear(3, 1)
        self.power = power
        self.rates: list[tuple[int, float, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        first, second = self.trainer.optimizers[0].param_groups
        self.rates.append((self.global_step, first["lr"], second["lr"]))
        loss = (self.layer(batch[0]) + self.other(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self.layer(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.layer.parameters(), "lr": 0.2},
            {"params": self.other.parameters(), "lr": 0.01},
        ]
        return polynomial(self, torch.optim.SGD(groups, momentum=0.9), self.power)


Loaders = Callable[[int], tuple[Any, Any]]


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(8, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=2)


def loaders(*, validate: bool = False) -> Loaders:
    def make(processes: int) -> tuple[Any, Any]:
        assert processes == 1
        return batches(), batches() if validate else None

    return make


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_rates_fall_as_a_power_of_what_is_left(tmp_path: Path, power: float) -> None:
    module = Line(power)
    fit(trainer_maker(), module, tmp_path, loaders(), epochs=3)
    assert [step for step, *_ in module.rates] == list(range(12))
    for step, first, second in module.rates:
        left = (1 - step / 12) ** power
        assert first == pytest.approx(0.2 * left)
        assert second == pytest.approx(0.01 * left)


class KilledError(Exception):
    pass


class Kill(pl.Callback):
    """Ends the work after a step; what a killed process had in memory is lost."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(("validate_every", "first"), [(1, 8), (2, 8), (3, 0)])
def test_a_killed_training_goes_on(tmp_path: Path, validate_every: int, first: int) -> None:
    whole, killed, resumed = Line(), Line(), Line()
    settings = {"epochs": 5, "validate_every": validate_every}
    both = loaders(validate=True)
    expected = fit(trainer_maker(), whole, tmp_path / "whole", both, **settings)
    with pytest.raises(KilledError):
        fit(trainer_maker(Kill(10)), killed, tmp_path / "cut", both, **settings)
    # A checkpoint after each validation: of the second epoch, which is step 8, or none yet.
    last = tmp_path / "cut" / "last.ckpt"
    assert last.is_file() == (first > 0)

    found = fit(trainer_maker(), resumed, tmp_path / "cut", both, **settings)

    assert [step for step, *_ in resumed.rates] == list(range(first, 20))
    np.testing.assert_allclose(resumed.rates, whole.rates[first:])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert found == expected
    assert found.keys() >= {"train/loss", "val/loss"}
    assert torch.load(last, weights_only=True)["global_step"] == 20
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_callbacks_and_loggers_are_used(tmp_path: Path) -> None:
    class Count(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.steps += 1

    count = Count()
    logger = CSVLogger(tmp_path, "csv", "")

    def quick(**options: Any) -> pl.Trainer:
        make: Callable[..., pl.Trainer] = trainer_maker()
        return make(**options, log_every_n_steps=1)

    fit(quick, Line(), tmp_path, loaders(), epochs=1, logger=logger, callbacks=(count,))
    assert count.steps == 4
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5
    assert "train/loss" in rows[0]


def test_processes_share_a_batch_evenly() -> None:
    assert [per_process(12, n, "batch_size") for n in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(InputError, match=r"^batch_size=12: cannot be shared by 5 devices"):
        per_process(12, 5, "batch_size")


@pytest.mark.parametrize(("rate", "epoch"), [(1e30, 1), (1e3, 2)])
def test_a_training_that_diverges_ends_and_leaves_nothing_to_go_on_from(
    tmp_path: Path, rate: float, epoch: int
) -> None:
    class Steep(Line):
        def configure_optimizers(self) -> Any:
            return polynomial(self, torch.optim.SGD(self.layer.parameters(), rate), 0)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.layer(batch[0]) - batch[1]).square().mean()

    for _ in range(2):
        with pytest.raises(InputError, match=rf"^here\.lr: training diverged in epoch {epoch}, "):
            fit(trainer_maker(), Steep(), tmp_path, loaders(), epochs=9, lr_setting="here.lr")
        assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("harm", ["cut", "emptied", "pickled"])
def test_a_checkpoint_that_cannot_be_gone_on_from(tmp_path: Path, capsys, harm: str) -> None:
    expected = fit(trainer_maker(), Line(), tmp_path / "whole", loaders(), epochs=2)
    (tmp_path / "cut").mkdir()
    last = tmp_path / "cut" / "last.ckpt"
    if harm == "pickled":
        torch.save({"state_dict": Malicious(tmp_path / "harm")}, last)
    else:
        data = (tmp_path / "whole" / "last.ckpt").read_bytes()
        last.write_bytes(data[:-1000] if harm == "cut" else b"")
    assert fit(trainer_maker(), Line(), tmp_path / "cut", loaders(), epochs=2) == expected
    (line,) = [x for x in capsys.readouterr().err.splitlines() if str(last) in x]
    assert "damaged" in line
    assert "trained anew" in line
    assert not (tmp_path / "harm").exists()


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Examples with noise that is drawn as crops and timm's augmentations are."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(3) + random.random() + np.random.rand()
        x = torch.full((3,), index / 12) + noise
        return x, x.sum(0, keepdim=True)


class Chance(Line):
    """Drops features out, and has BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0.01 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("validate_every", "first"), [(1, 9), (2, 6), (4, 0)])
def test_a_killed_training_draws_what_it_would_have_drawn(
    tmp_path: Path, validate_every: int, first: int, workers: int
) -> None:
    def shuffled(processes: int) -> tuple[Any, Any]:
        train = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
        return train, DataLoader(Noisy(), batch_size=4)

    settings = {"epochs": 6, "validate_every": validate_every}
    whole, killed, resumed = Chance(), Chance(), Chance()
    pl.seed_everything(1)
    expected = fit(trainer_maker(), whole, tmp_path / "whole", shuffled, **settings)
    pl.seed_everything(1)
    with pytest.raises(KilledError):
        fit(trainer_maker(Kill(10)), killed, tmp_path / "cut", shuffled, **settings)
    # Without a checkpoint the same start; with one, whatever was drawn before.
    pl.seed_everything(2 if first else 1)
    found = fit(trainer_maker(), resumed, tmp_path / "cut", shuffled, **settings)
    assert resumed.rates[0][0] == first
    assert found == expected
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_a_training_killed_after_its_last_checkpoint_knows_its_metrics(tmp_path: Path) -> None:
    both = loaders(validate=True)
    expected = fit(trainer_maker(), Line(), tmp_path, both, epochs=2)
    assert fit(trainer_maker(), Line(), tmp_path, both, epochs=2) == expected
    assert expected.keys() >= {"train/loss", "val/loss"}
