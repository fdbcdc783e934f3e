"""Make maps and masks with a trained classifier: ``python infer.py prototypes.k=12``.

``python infer.py --help`` lists the groups, ``--cfg job`` shows what will run; ``-m`` or a study
such as ``experiments=sweep_k`` runs many settings for little more than one costs.
"""

import time
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.done import done_metrics, headline, write_done
from lpcam.programs.entry import build, choices, command_line, job, run


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
@job
def main(cfg: DictConfig) -> float | None:
    """Run every stage; return the mIoU on the last split, of refined maps where there are any."""
    start_time = time.perf_counter()
    output = Path(cfg.paths.output)
    config = OmegaConf.to_container(cfg, resolve=True)
    last = cfg.dataset.map_splits[-1]
    metrics = done_metrics(output, config)
    if metrics is not None:  # without masks there are none
        print(f"Already done: {output}")
        return headline(metrics, last)

    from lpcam import map_stages, outputs
    from lpcam.storage.hashing import fingerprint
    from lpcam.reporting.report import Method, print_table, write_report
    from lpcam.reporting.shown import choose_pictures, show
    from lpcam.reporting.tracking import log_results, recording, start
    from lpcam.programs.run import Run
    from lpcam.storage.ranks import is_main_process
    from lpcam.storage.files import write_atomically, write_json

    overrides = HydraConfig.get().overrides.task
    own = Run(cfg, overrides)
    dataset, threshold = own.dataset, cfg.thresholds.seed_background
    maps = own.maps(own.settings)
    if refined := own.refined(maps):
        maps["refined"] = refined
    if not is_main_process():
        return None
    scores = map_stages.scores(own.store, maps, dataset)
    metrics = {
        f"{split}/{name}/{key}": value
        for name, by_split in scores.items()
        for split, result in by_split.items()
        for key, value in result.metrics(dataset.classes, own.threshold(name)).items()
    }
    write_atomically(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_json(output / "metrics.json", metrics)
    replace(own.prototypes, model=fingerprint(own.classifier)).save(
        output / "prototypes.safetensors"
    )
    for split in dataset.map_splits:
        outputs.export(
            output,
            maps[cfg.refiner.source][split],
            refined.get(split),
            dataset.pictures(split),
            own.threshold("refined" if refined else cfg.refiner.source),
            cfg.thresholds.unsure_band,
        )
    stages = {"features": own.features, "clustering": own.clustering[0]}
    stages |= {f"{name} of {split}": stage for name in maps for split, stage in maps[name].items()}
    titles = own.titles
    methods = {
        name: Method(
            titles[name],
            scores[name],
            {split: maps[name][split].folder for split in dataset.map_splits},
        )
        for name in titles
    }
    if cfg.report:
        write_report(
            output / "report.html",
            title=f"LPCAM on {cfg.dataset._target_.split('.')[-1]}",
            command=command_line("infer", overrides),
            config=OmegaConf.to_yaml(cfg, resolve=True),
            dataset=dataset,
            splits={split: dataset.pictures(split) for split in dataset.map_splits},
            methods=list(methods.values()),
            threshold=threshold,
            prototypes=outputs.prototype_views(
                own.features, own.clustering[1], own.prototypes, own.classifier, dataset
            ),
            seconds={name: stage.manifest["seconds"] for name, stage in stages.items()},
            gallery_split=last,
        )
    if cfg.logger:
        with recording():
            chosen = choose_pictures(dataset.pictures(last), cfg.shown_pictures)
            keys = {"store": {name: stage.key for name, stage in stages.items()}}
            log_results(
                start(build(cfg.logger), config | keys, choices()),
                metrics=metrics,
                scores=scores,
                classes=dataset.classes,
                figures=sorted((output / "figures").glob("*.png")),
                shown=show(dataset, chosen, methods, last, threshold),
                made={name: output / file for name, file in ARTIFACTS.items()},
                used={f"classifier-{own.trained.key}": own.checkpoint} if own.trained else {},
            )
    seconds = {"total": time.perf_counter() - start_time}
    seconds |= {name: stage.seconds for name, stage in stages.items() if stage.seconds is not None}
    write_done(output, config, seconds, metrics)
    print_table(scores, titles)
    print(f"Results: {output / ('report.html' if cfg.report else '')}")
    return headline(metrics, last)


ARTIFACTS = {"prototypes": "prototypes.safetensors", "metrics": "metrics.json"}

if __name__ == "__main__":
    run(main, Path(__file__).parent)
