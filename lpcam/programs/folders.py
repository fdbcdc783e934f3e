"""Where the configs and the studies lie: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# The folder that holds conf and experiments.
PROJECT = next((f for f in (PACKAGE, PACKAGE.parent) if (f / "conf").is_dir()), PACKAGE.parent)
CONF = PROJECT / "conf"
