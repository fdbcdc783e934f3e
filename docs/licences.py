"""Writes docs/licences.md from what is installed: ``python docs/licences.py``."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HEAD = """# Licences

What `pip install lpcam` brings, extras left out, and what each package says of its licence; made by
`python docs/licences.py`. The project itself is Apache-2.0. The photos of `dataset=cutouts` come
from Debian when they are first needed (Tux Paint, GPL-2) and are no part of any package.

| package | licence |
|---|---|
"""


def needed(name: str, found: dict[str, str]) -> None:
    """Add a package and what it requires, without extras, to what was found."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        package = distribution(name)
    except PackageNotFoundError:  # of another system, or of another version of Python
        return
    meta = package.metadata
    classifiers = [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    said = meta["License-Expression"] or ""
    if not said and classifiers:
        said = ", ".join(c.split(" :: ")[-1] for c in classifiers)
    found[key] = said or (meta["License"] or "not told").strip().splitlines()[0][:60]
    for requirement in package.requires or []:
        if "extra ==" not in requirement:
            needed(re.split(r"[^\w.-]", requirement)[0], found)


if __name__ == "__main__":
    packages: dict[str, str] = {}
    needed("lpcam", packages)
    rows = [f"| {name} | {said} |" for name, said in sorted(packages.items())]
    Path(__file__).with_name("licences.md").write_text(HEAD + "\n".join(rows) + "\n")
