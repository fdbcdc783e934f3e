"""Train the multi-label classifier: ``lpcam train``, or ``python train.py``.

``--help`` lists the groups, ``--cfg job`` shows what will run.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.build import build
from lpcam.programs.entry import choices, job, run
from lpcam.programs.folders import CONF

SUMMARIES = {"val/map": "max", "val/f1": "max", "val/loss": "min", "train/loss": "min"}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@job
def train(cfg: DictConfig) -> float | None:
    """Train, unless the store holds this classifier; return its validation mAP."""
    from lpcam.programs.setup import set_up
    from lpcam.reporting.tracking import finish, start, tolerated
    from lpcam.reporting.wandb_content import log_files
    from lpcam.stages import classifier
    from lpcam.storage.files import write_json

    setup = set_up(cfg)
    stage, checkpoint = setup.stage, setup.stage.folder / "last.ckpt"
    if stage.done:
        print(f"Already trained: {checkpoint}")
        return None
    logger = None
    try:
        if cfg.logger:
            with tolerated():
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                logger = start(build(cfg.logger), config, choices(), SUMMARIES)
        metrics = classifier.train(
            Path(cfg.paths.store),
            stage,
            build(cfg.trainer),
            setup.dataset,
            setup.host,
            setup.fitting,
            num_workers=cfg.num_workers,
            logger=logger,
        )
        if logger:
            with tolerated():
                log_files(logger, made={f"classifier-{stage.key}": checkpoint})
    finally:
        finish()
    write_json(Path(cfg.paths.output) / "metrics.json", metrics)
    print(f"Trained: {checkpoint}")
    print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return metrics.get("val/map")


def main() -> None:
    """Run the program with the process's arguments."""
    run(train)


if __name__ == "__main__":
    main()
