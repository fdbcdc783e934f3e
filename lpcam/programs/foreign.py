"""What a config from elsewhere may not do.

Hydra builds its callbacks and launchers before a program of ours sees its config, so a folder of
configs is looked at before Hydra is. Settings of launchers are let through, and can start what they
like: see SECURITY.md.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from lpcam.errors import InputError
from lpcam.programs.build import check_targets

# A variable of the environment that is named so is nobody's setting, and config.yaml, the report
# and W&B would tell it. What is put together from parts may be one.
SECRET = re.compile(r"\$\{oc\.env:[^},]*(key|token|secret|passw|credential|\$)", re.IGNORECASE)


def check_folders(arguments: Sequence[str]) -> None:
    """Look at the folder of configs that a command line names, if it names one.

    Args:
        arguments: Those of a Hydra program.

    Raises:
        InputError: One of its files is no YAML, or has a ``_target_`` that is not called.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    given, _ = parser.parse_known_args(arguments)
    for folder in filter(None, vars(given).values()):
        for path in sorted(Path(folder).rglob("*.yaml")):
            try:
                check_targets(yaml.safe_load(path.read_text("utf-8")))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise InputError(f"{path}: {' '.join(str(error).split())}") from error


def check_secrets(*configs: DictConfig) -> None:
    """Make sure that no value is a secret of the environment.

    Raises:
        InputError: One is.
    """
    for config in configs:
        for text in _texts(OmegaConf.to_container(config, resolve=False)):
            if SECRET.search(text):
                raise InputError(
                    f"{text}: refused, results would tell a secret of the environment; take it out"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
