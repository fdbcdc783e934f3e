"""What every network that is trained here shares: the schedule, and going on after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.optim import Optimizer
from torch.optim.lr_scheduler import PolynomialLR

MakeTrainer = Callable[..., pl.Trainer]


def polynomial(module: pl.LightningModule, optimizer: Optimizer, power: float) -> Any:
    """Make learning rates fall as ``(1 - step / steps) ** power``.

    Args:
        module: The module that is trained; its trainer knows the number of steps.
        optimizer: The optimiser.
        power: The exponent.

    Returns:
        What ``configure_optimizers`` returns.
    """
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = PolynomialLR(optimizer, steps, power)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    make_trainer: MakeTrainer,
    module: pl.LightningModule,
    folder: Path,
    train: Any,
    val: Any = None,
    *,
    epochs: int,
    validate_every: int = 1,
    logger: Any = None,
    callbacks: tuple[Callback, ...] = (),
) -> dict[str, float]:
    """Train a network, going on from the last checkpoint that a killed run left.

    Args:
        make_trainer: Makes Lightning's trainer.
        module: The network.
        folder: Where ``last.ckpt`` is, and goes.
        train: Batches to learn from.
        val: Batches to validate on, if any.
        epochs: Passes over the batches.
        validate_every: Epochs between validations; a checkpoint is written after each.
        logger: Lightning loggers; None for none.
        callbacks: Further callbacks.

    Returns:
        Metrics of the last epoch.
    """
    checkpoint = ModelCheckpoint(
        folder, "last", enable_version_counter=False, every_n_epochs=validate_every
    )
    trainer = make_trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        num_sanity_val_steps=0,
        logger=logger or False,
        callbacks=[checkpoint, *callbacks],
    )
    last = folder / "last.ckpt"
    resume = str(last) if last.is_file() else None
    trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(last)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
