"""Make maps and masks with a trained classifier: ``lpcam infer``, or ``python infer.py``.

With ``task=segmentation masks=RUN`` the masks are those of the network that learnt from that run's.
``--help`` lists the groups, ``--cfg job`` shows what will run; ``-m`` or a study such as
``experiments=sweep_k`` runs many settings for little more than one costs.
"""

import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.done import clear, done_metrics, headline, look_again, write_done
from lpcam.programs.entry import job, run
from lpcam.programs.folders import CONF
from lpcam.programs.options import for_task


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="infer")
@job
def infer(cfg: DictConfig) -> float | None:
    """Run every stage; return the mIoU on the last split, of refined maps where there are any."""
    start = time.perf_counter()
    cfg = for_task(cfg)
    output, last = Path(cfg.paths.output), cfg.dataset.map_splits[-1]
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    report = cfg.report
    if report is None:
        report = HydraConfig.get().mode != RunMode.MULTIRUN
    metrics = done_metrics(output, config, report=report)
    if metrics is not None:  # without masks there are none
        print(f"Already done: {output}")
        return headline(metrics, last)

    from lpcam.reporting.scores import print_table
    from lpcam.storage.ranks import is_main_process

    overrides = HydraConfig.get().overrides.task
    outputs: Any
    this: Any
    if "segmenter" in cfg:
        from lpcam.programs import segmentation as outputs

        this = outputs.SegmentationRun(cfg, overrides)
    else:
        from lpcam.programs import outputs
        from lpcam.programs.run import Run

        this = Run(cfg, overrides)
    results = this.results()
    if not is_main_process():
        return None
    clear(output)
    outputs.save(output, cfg, this, results)
    if report:
        outputs.report(output, cfg, this, results)
    seconds = time.perf_counter() - start
    write_done(output, config, results.metrics, results.stages, seconds)
    if cfg.logger:  # last, so that nothing of the results waits for a server
        outputs.log(output, cfg, this, results)
    print_table(results.scores, this.titles)
    print(f"Results: {output / ('report.html' if report else '')}")
    return headline(results.metrics, last)


def main() -> None:
    """Run the program with the process's arguments."""
    look_again()
    run(infer)


if __name__ == "__main__":
    main()
