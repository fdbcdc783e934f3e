"""A file that does harm when it is read carelessly."""

import os
from collections.abc import Callable
from pathlib import Path


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)
