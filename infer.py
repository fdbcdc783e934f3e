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

from lpcam.entry import build, command_line, job, run


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
@job
def main(cfg: DictConfig) -> float | None:
    """Run every stage; return the mIoU on the last split, of refined maps where there are any."""
    from lpcam import outputs

    start = time.perf_counter()
    output = Path(cfg.paths.output)
    config = OmegaConf.to_container(cfg, resolve=True)
    if metrics := outputs.done_metrics(output, config):
        print(f"Already done: {output}")
        return outputs.headline(metrics, cfg.dataset.map_splits)

    from lpcam import map_stages
    from lpcam.prototype_set import fingerprint
    from lpcam.reporting.report import Method, print_table, write_report
    from lpcam.reporting.tracking import finish, log_results
    from lpcam.run import Run
    from lpcam.store import Stage, is_main_process

    overrides = HydraConfig.get().overrides.task
    own = Run(cfg, overrides)
    dataset, threshold = own.dataset, cfg.thresholds.seed_background
    maps = own.maps(own.settings)
    if refined := own.refined(maps):
        maps["refined"] = refined
    if not is_main_process():
        return None
    thresholds = dict.fromkeys(maps, threshold)
    if own.refiner:
        thresholds["refined"] = own.refiner.background
    scores: dict = {name: {} for name in maps}
    for split in dataset.map_splits:
        stages = {name: by_split[split] for name, by_split in maps.items()}
        for name, result in map_stages.scores(own.store, stages, dataset, split).items():
            scores[name][split] = result
    metrics = {
        f"{split}/{name}/{key}": value
        for name, by_split in scores.items()
        for split, result in by_split.items()
        for key, value in result.metrics(dataset.classes, thresholds[name]).items()
    }
    outputs.write_json(output / "metrics.json", metrics)
    replace(own.prototypes, model=fingerprint(own.classifier)).save(
        output / "prototypes.safetensors"
    )
    shown = "refined" if own.refiner else cfg.refiner.source
    for split in dataset.map_splits:
        outputs.export(output, maps[shown][split], dataset.pictures(split), thresholds[shown])
    last = dataset.map_splits[-1]
    stages: dict[str, Stage] = {"features": own.features, "clustering": own.clustering[0]}
    stages |= {f"{name} of {split}": maps[name][split] for name in maps for split in maps[name]}
