"""The config of ``infer.py`` for a script: as the program would get it, without running it."""

import os
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lpcam.programs.folders import CONF, PROJECT


def infer_config(overrides: Sequence[str], output: str) -> DictConfig:
    """Compose and resolve the config; nothing is logged.

    Args:
        overrides: Those of ``infer.py``.
        output: The folder that stands for a run's own.
    """
    os.environ["LPCAM_PROJECT"] = str(PROJECT)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("infer", [*overrides, "logger=none", f"paths.output={output}"])
    OmegaConf.resolve(config)
    return config
