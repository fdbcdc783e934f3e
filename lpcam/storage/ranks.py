"""Which process of a distributed job this is."""

import os


def is_main_process() -> bool:
    """Whether this is the first, or only, process of a distributed job."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
