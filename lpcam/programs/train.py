"""Train the multi-label classifier: ``lpcam train``, or ``python train.py``.

With ``task=segmentation masks=RUN`` it trains a segmentation network on a run's masks. ``--help``
lists the groups, ``--cfg job`` shows what will run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.build import build, trainer_maker
from lpcam.programs.entry import choices, job, run
from lpcam.programs.folders import CONF
from lpcam.programs.options import for_task

if TYPE_CHECKING:
    from lpcam.models.training import MakeTrainer
    from lpcam.storage.store import Stage

SUMMARIES = {"val/map": "max", "val/f1": "max", "val/loss": "min", "train/loss": "min"}


@dataclass(frozen=True)
class Training:
    """What a config trains.

    Attributes:
        stage: Where it lies in the store.
        file: What is left of it there.
        fit: Trains it with a logger, or finds it; gives its metrics.
    """

    stage: "Stage"
    file: Path
    fit: Callable[[Any], dict[str, float]]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@job
def train(cfg: DictConfig) -> float | None:
    """Train, unless the store holds this network; return a classifier's validation mAP."""
    from lpcam.reporting.tracking import finish, start, tolerated
    from lpcam.reporting.wandb_content import log_files
    from lpcam.storage.files import write_json
    from lpcam.storage.ranks import is_main_process

    cfg = for_task(cfg)
    prepare = _segmenter if "segmenter" in cfg else _classifier
    training = prepare(cfg, trainer_maker(cfg.trainer))
    output, was_done, logger = Path(cfg.paths.output), training.stage.done, None
    try:
        if cfg.logger and not was_done:
            with tolerated():
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                logger = start(build(cfg.logger), config, choices(), SUMMARIES)
        metrics = training.fit(logger)
        if is_main_process():
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "metrics.json", metrics)
            print(f"{'Already trained' if was_done else 'Trained'}: {training.file}")
            print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if logger:
            with tolerated():
                artifact = f"{training.stage.name}-{training.stage.key}"
                log_files(logger, made={artifact: training.file})
    finally:
        finish()
    return metrics.get("val/map")


def _classifier(cfg: DictConfig, make_trainer: "MakeTrainer") -> Training:
    from lpcam.programs.setup import set_up, train_base
    from lpcam.stages import classifier

    setup, store = set_up(cfg), Path(cfg.paths.store)

    def fit(logger: Any) -> dict[str, float]:
        train_base(setup, store, make_trainer, seed=cfg.seed, num_workers=cfg.num_workers)
        return classifier.train(
            store,
            setup.stage,
            make_trainer,
            setup.dataset,
            setup.host,
            setup.fitting,
            num_workers=cfg.num_workers,
            logger=logger,
        )

    return Training(setup.stage, setup.stage.folder / "last.ckpt", fit)


def _segmenter(cfg: DictConfig, make_trainer: "MakeTrainer") -> Training:
    from lpcam.programs.segmentation import set_up_network
    from lpcam.stages import segmenter

    setup = set_up_network(cfg)

    def fit(logger: Any) -> dict[str, float]:
        return segmenter.train(
            setup.stage,
            make_trainer,
            setup.dataset,
            setup.masks,
            setup.network,
            setup.architecture,
            setup.learning,
            backbone=cfg.backbone.name,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            logger=logger,
        )

    return Training(setup.stage, setup.stage.folder / segmenter.NETWORK, fit)


def main() -> None:
    """Run the program with the process's arguments."""
    run(train)


if __name__ == "__main__":
    main()
