"""Make maps and masks with a trained classifier: ``python infer.py prototypes.k=12``.

``python infer.py --help`` lists the groups, ``--cfg job`` shows what will run.
"""

import json
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from lpcam.entry import build, choices, command_line, job, run


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
@job
def main(cfg: DictConfig) -> float | None:
    """Run every stage; return LPCAM's mIoU on the last split."""
    import pytorch_lightning as pl

    from lpcam import outputs, pipeline
    from lpcam.backbones import build_backbone
    from lpcam.classifier import load_classifier
    from lpcam.prototype_set import fingerprint
    from lpcam.prototypes import select
    from lpcam.reporting.report import Method, print_table, write_report
    from lpcam.reporting.shown import choose_pictures, show
    from lpcam.reporting.tracking import log_results, recording, start
    from lpcam.store import digest, is_main_process, write_atomically

    store, output = Path(cfg.paths.store), Path(cfg.paths.output)
    make_trainer = build(cfg.trainer)
    dataset = build(cfg.dataset)
    dataset.prepare()
    pl.seed_everything(cfg.seed, verbose=False)
    backbone = build_backbone(cfg.backbone.name, cfg.backbone.weights)
    ckpt, trained = cfg.ckpt, None
    if ckpt is None:
        settings = OmegaConf.to_container(cfg.classifier)
        trained = pipeline.classifier_stage(store, dataset, backbone, settings, cfg.seed)
        groups = ("dataset", "backbone", "classifier", "paths", "seed")
        ckpt = pipeline.trained_checkpoint(trained, command_line("train", groups))
    classifier = load_classifier(Path(ckpt), backbone, len(dataset.classes))

    features = pipeline.features(
        store,
        make_trainer,
        classifier,
        dataset.pictures(dataset.prototype_split),
        local=True,
        num_workers=cfg.num_workers,
    )
    clustered, centers = pipeline.centers(
        store,
        features,
        classifier,
        dataset,
        k=cfg.prototypes.k,
        tau=cfg.thresholds.activation,
        seed=cfg.prototypes.seed,
        max_iter=cfg.prototypes.max_iter,
        allow_missing=cfg.prototypes.allow_missing,
    )
    prototypes = select(
        centers,
        classifier.weight,
        dataset.classes,
        class_minimum=cfg.thresholds.class_score,
        context_maximum=cfg.thresholds.context_score,
        context_minimum=cfg.thresholds.context_floor,
    )
    settings = {
        "cam": pipeline.MapSetting(),
        "lpcam": pipeline.lpcam_setting(prototypes, cfg.prototypes.use),
    }
    if cfg.prototypes.use == "both":
        settings["lpcam_class"] = pipeline.lpcam_setting(prototypes, "class")
    maps = {
        split: pipeline.maps(
            store,
            make_trainer,
            classifier,
            dataset.pictures(split),
            settings,
            scales=cfg.inference.scales,
            flip=cfg.inference.flip,
            batch_size=cfg.inference.batch_size,
            num_workers=cfg.num_workers,
        )
        for split in dataset.map_splits
    }
    if not is_main_process():
        return None
    scores = {
        name: {
            split: result
            for split in dataset.map_splits
            if (result := pipeline.score(store, maps[split][name], dataset, split))
        }
        for name in settings
    }

    threshold = cfg.thresholds.seed_background
    metrics = {
        f"{split}/{name}/{key}": value
        for name, by_split in scores.items()
        for split, result in by_split.items()
        for key, value in result.metrics(dataset.classes, threshold).items()
    }
    config = OmegaConf.to_container(cfg, resolve=True)
    write_atomically(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_atomically(output / "metrics.json", json.dumps(metrics, indent=1))
    replace(prototypes, model=fingerprint(classifier)).save(output / "prototypes.safetensors")
    for split in dataset.map_splits:
        outputs.export(output, maps[split]["lpcam"], dataset.pictures(split), threshold)
    stages = {"features": features, "clustering": clustered}
    stages |= {f"maps of {split}": maps[split]["lpcam"] for split in dataset.map_splits}
    methods = {
        name: Method(TITLES[name], scores[name], {s: maps[s][name].folder for s in maps})
        for name in settings
    }
    write_report(
        output / "report.html",
        title=f"LPCAM on {cfg.dataset._target_.split('.')[-1]}",
        command=command_line("infer"),
        config=OmegaConf.to_yaml(cfg, resolve=True),
        dataset=dataset,
        splits={split: dataset.pictures(split) for split in dataset.map_splits},
        methods=list(methods.values()),
        threshold=threshold,
        prototypes=outputs.prototype_views(features, centers, prototypes, classifier, dataset),
        seconds={name: stage.manifest["seconds"] for name, stage in stages.items()},
        gallery_split=dataset.map_splits[-1],
    )
    if cfg.logger:
        with recording():
            shown_split = dataset.map_splits[-1]
            chosen = choose_pictures(dataset.pictures(shown_split), cfg.shown_pictures)
            keys = {"store": {name: stage.key for name, stage in stages.items()}}
            log_results(
                start(build(cfg.logger), config | keys, choices()),
                metrics=metrics,
                scores=scores,
                classes=dataset.classes,
                figures=sorted((output / "figures").glob("*.png")),
                shown=show(dataset, chosen, methods, shown_split, threshold),
                made={name: output / file for name, file in ARTIFACTS.items()},
                used={f"classifier-{trained.key}": Path(ckpt)} if trained else {},
            )
    write_atomically(
        output / "DONE.json", json.dumps({"config": digest(config)} | metrics, indent=1)
    )
    print_table(scores, TITLES)
    print(f"Report: {output / 'report.html'}")
    return metrics.get(f"{dataset.map_splits[-1]}/lpcam/miou")


TITLES = {"cam": "CAM", "lpcam": "LPCAM", "lpcam_class": "LPCAM without context"}
ARTIFACTS = {"prototypes": "prototypes.safetensors", "metrics": "metrics.json"}

if __name__ == "__main__":
    run(main, Path(__file__).parent)
