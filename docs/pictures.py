# python docs/pictures.py   makes the pictures of docs/library.md, by the Python that it shows
"""The Python of a Markdown file, as one program."""

import re
from pathlib import Path


def blocks(path: Path) -> list[str]:
    """The Python blocks of a Markdown file."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


if __name__ == "__main__":
    exec("\n".join(blocks(Path(__file__).with_name("library.md"))))
