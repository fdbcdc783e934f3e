"""Train the multi-label classifier: ``lpcam train``, or ``python train.py``.

``--help`` lists the groups, ``--cfg job`` shows what will run.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.build import build, trainer_maker
from lpcam.programs.entry import choices, job, run
from lpcam.programs.folders import CONF

SUMMARIES = {"val/map": "max", "val/f1": "max", "val/loss": "min", "train/loss": "min"}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@job
def train(cfg: DictConfig) -> float | None:
    """Train, unless the store holds this classifier; return its validation mAP."""
    from lpcam.programs.setup import set_up, train_base
    from lpcam.reporting.tracking import finish, start, tolerated
    from lpcam.reporting.wandb_content import log_files
    from lpcam.stages import classifier
    from lpcam.storage.files import write_json
    from lpcam.storage.ranks import is_main_process

    make_trainer = trainer_maker(cfg.trainer)
    setup = set_up(cfg)
    output, checkpoint = Path(cfg.paths.output), setup.stage.folder / "last.ckpt"
    was_done, logger = setup.stage.done, None
    try:
        if cfg.logger and not was_done:
            with tolerated():
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                logger = start(build(cfg.logger), config, choices(), SUMMARIES)
        store, workers = Path(cfg.paths.store), cfg.num_workers
        train_base(setup, store, make_trainer, seed=cfg.seed, num_workers=workers)
        metrics = classifier.train(
            store,
            setup.stage,
            make_trainer,
            setup.dataset,
            setup.host,
            setup.fitting,
            num_workers=workers,
            logger=logger,
        )
        if is_main_process():
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "metrics.json", metrics)
            print(f"{'Already trained' if was_done else 'Trained'}: {checkpoint}")
            print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if logger:
            with tolerated():
                log_files(logger, made={f"classifier-{setup.stage.key}": checkpoint})
    finally:
        finish()
    return metrics.get("val/map")


def main() -> None:
    """Run the program with the process's arguments."""
    run(train)


if __name__ == "__main__":
    main()
