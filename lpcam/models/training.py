"""What every network that is trained here shares: the schedule, and going on after a kill."""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
)

from lpcam.errors import InputError

MakeTrainer = Callable[..., pl.Trainer]


def polynomial(
    module: pl.LightningModule,
    optimizer: Optimizer,
    power: float,
    *,
    warmup: int = 0,
    every: int = 1,
) -> Any:
    """Make learning rates fall as ``(1 - step / steps) ** power``.

    Args:
        module: The module that is trained; its trainer knows the number of steps.
        optimizer: The optimiser.
        power: The exponent.
        warmup: Steps in which a further factor rises evenly from 0.1 to 1.
        every: Steps for which a rate stays; those between two multiples have that of the first.

    Returns:
        What ``configure_optimizers`` returns.
    """
    steps = int(module.trainer.estimated_stepping_batches)
    schedule: LRScheduler = PolynomialLR(optimizer, steps, power)
    if every > 1:
        schedule = LambdaLR(
            optimizer, lambda step: max(1 - step // every * every / steps, 0) ** power
        )
    if warmup:
        schedule = ChainedScheduler([schedule, LinearLR(optimizer, 0.1, total_iters=warmup)])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(
    module: pl.LightningModule,
    optimizer: Optimizer,
    *,
    warm_up_epochs: float,
    warm_up_lr: float,
    min_lr: float,
) -> Any:
    """Make learning rates rise in a line, then fall as the half cosine over the whole training.

    Args:
        module: The module that is trained; its trainer knows the numbers of steps and epochs.
        optimizer: The optimiser; its groups share one rate.
        warm_up_epochs: Epochs of the line.
        warm_up_lr: Where the line starts.
        min_lr: Where the cosine ends.

    Returns:
        What ``configure_optimizers`` returns.
    """
    steps = int(module.trainer.estimated_stepping_batches)
    warm_up = steps * warm_up_epochs / (module.trainer.max_epochs or 1)
    lr = optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < warm_up:
            return (warm_up_lr + (lr - warm_up_lr) * step / warm_up) / lr
        return (min_lr + (lr - min_lr) * (1 + math.cos(math.pi * step / steps)) / 2) / lr

    schedule = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def per_process(batch_size: int, processes: int, key: str) -> int:
    """What each process of a job contributes to a batch: a step sees as many pictures as with one.

    Args:
        batch_size: Pictures a step.
        processes: How many share them.
        key: What the user calls the batch size.

    Raises:
        InputError: They cannot share them evenly.
    """
    if batch_size % processes:
        raise InputError(
            f"{key}={batch_size}: cannot be shared by {processes} devices; give a multiple"
        )
    return batch_size // processes


class _Diverged(Callback):
    """Ends a training whose loss or weights are no numbers any more.

    Args:
        setting: What the user calls the learning rate.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *batch: Any
    ) -> None:
        if not trainer.is_last_batch:  # looking at every step would make a GPU wait
            return
        finite = bool(outputs["loss"].isfinite())
        finite = finite and all(bool(w.isfinite().all()) for w in module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise InputError(
                f"{self.setting}: training diverged in epoch {trainer.current_epoch + 1}, its loss "
                "or weights are no finite numbers; lower it"
            )


class _RandomNumbers(Callback):
    """Keeps the state of generators in checkpoints: a resumed training draws on.

    Those of torch, and of Python and NumPy, which timm's augmentations draw from.
    """

    def state_dict(self) -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        kind, numbers, *rest = np.random.get_state()
        return {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_gpu else None,
            "python": random.getstate(),
            "numpy": [kind, np.asarray(numbers).tolist(), *rest],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads it before the first batches are drawn, for it counts them.
        torch.set_rng_state(state_dict["cpu"].cpu())
        if state_dict["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"].cpu())
        if "python" in state_dict:  # a checkpoint of an earlier version has none
            version, numbers, gauss = state_dict["python"]
            random.setstate((version, tuple(numbers), gauss))
            np.random.set_state(tuple(state_dict["numpy"]))


class _Metrics(Callback):
    """Keeps an epoch's metrics in its checkpoint, for a run that was killed after the last."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = dict(state_dict)


def readable(checkpoint: Path) -> bool:
    """Whether a checkpoint is there to go on from; one that was cut or altered is not."""
    if not checkpoint.is_file():
        return False
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        print(f"{checkpoint}: damaged ({type(error).__name__}): trained anew", file=sys.stderr)
        return False
    return True


def fit(
    make_trainer: MakeTrainer,
    module: pl.LightningModule,
    folder: Path,
    loaders: Callable[[int], tuple[Any, Any]],
    *,
    epochs: int,
    validate_every: int = 1,
    logger: Any = None,
    callbacks: tuple[Callback, ...] = (),
    lr_setting: str = "classifier.lr",
) -> dict[str, float]:
    """Train a network, going on from the last checkpoint that a killed run left.

    Args:
        make_trainer: Makes Lightning's trainer.
        module: The network.
        folder: Where ``last.ckpt`` is, and goes.
        loaders: Makes the batches to learn from and those to validate on, or None, for one of so
            many processes that share them.
        epochs: Passes over the batches.
        validate_every: Epochs between validations; a checkpoint is written after each.
        logger: Lightning loggers; None for none.
        callbacks: Further callbacks.
        lr_setting: What the user calls the learning rate.

    Returns:
        Metrics of the last epoch.

    Raises:
        InputError: Training diverged. Its checkpoint is gone then.
    """
    checkpoint = ModelCheckpoint(
        folder,
        "last",
        enable_version_counter=False,
        every_n_epochs=validate_every,
        save_on_train_epoch_end=True,  # after validation, and nothing is drawn before the next
    )
    kept = _Metrics()
    trainer = make_trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        num_sanity_val_steps=0,
        logger=logger or False,
        callbacks=[checkpoint, _Diverged(lr_setting), _RandomNumbers(), kept, *callbacks],
    )
    last = folder / "last.ckpt"
    resume = str(last) if readable(last) else None
    train, val = loaders(trainer.world_size)
    try:
        trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)
    except InputError:
        last.unlink(missing_ok=True)  # nothing good can go on from there
        raise
    trainer.save_checkpoint(last)
    return {name: float(value) for name, value in trainer.callback_metrics.items()} or kept.found
