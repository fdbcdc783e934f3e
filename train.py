"""Train the multi-label classifier: ``python train.py dataset=cutouts``.

``python train.py --help`` lists the groups, ``--cfg job`` shows what will run.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.entry import build, choices, job, run


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@job
def main(cfg: DictConfig) -> float | None:
    """Train, unless the store holds this classifier; return its validation mAP."""
    import pytorch_lightning as pl

    from lpcam import training
    from lpcam.models.backbones import build_backbone
    from lpcam.models.classifier import Classifier
    from lpcam.reporting.tracking import finish, log_files, start, tolerated
    from lpcam.storage.files import write_json

    dataset = build(cfg.dataset)
    dataset.prepare()
    pl.seed_everything(cfg.seed, verbose=False)
    backbone = build_backbone(cfg.backbone.name, cfg.backbone.weights)
    settings = OmegaConf.to_container(cfg.classifier)
    stage = training.classifier_stage(Path(cfg.paths.store), dataset, backbone, settings, cfg.seed)
    if stage.done:
        print(f"Already trained: {stage.folder / 'last.ckpt'}")
        return None
    classifier = Classifier(
        backbone,
        len(dataset.classes),
        optimizer=cfg.classifier.optimizer,
        lr=cfg.classifier.lr,
        head_lr_factor=cfg.classifier.head_lr_factor,
        momentum=cfg.classifier.momentum,
        weight_decay=cfg.classifier.weight_decay,
        poly_power=cfg.classifier.poly_power,
        freeze_backbone=cfg.classifier.freeze_backbone,
        freeze_stem=cfg.classifier.freeze_stem,
    )
    config = OmegaConf.to_container(cfg, resolve=True)
    logger = None
    try:
        if cfg.logger:
            with tolerated():
                logger = start(build(cfg.logger), config, choices(), SUMMARIES)
        metrics = training.train(
            Path(cfg.paths.store),
            stage,
            build(cfg.trainer),
            dataset,
            classifier,
            epochs=cfg.classifier.epochs,
            validate_every=cfg.classifier.validate_every,
            batch_size=cfg.classifier.batch_size,
            long_side=cfg.classifier.long_side,
            crop=cfg.classifier.crop,
            num_workers=cfg.num_workers,
            logger=logger,
        )
        if logger:
            with tolerated():
                log_files(logger, made={f"classifier-{stage.key}": stage.folder / "last.ckpt"})
    finally:
        finish()
    write_json(Path(cfg.paths.output) / "metrics.json", metrics)
    print(f"Trained: {stage.folder / 'last.ckpt'}")
    print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return metrics.get("val/map")


SUMMARIES = {"val/map": "max", "val/f1": "max", "val/loss": "min", "train/loss": "min"}

if __name__ == "__main__":
    run(main, Path(__file__).parent)
