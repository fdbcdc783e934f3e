"""The Python of README.md and docs/library.md runs, commands exist, API pages are made."""

import re
import runpy
import warnings
from pathlib import Path

import numpy as np
import pdoc
import pytest
from PIL import Image

from lpcam.data.cutouts import PHOTOS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
blocks = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["blocks"]


@pytest.mark.parametrize("block", blocks(ROOT / "README.md"))
def test_python_of_the_readme_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.filterwarnings("ignore:.* no prototype scores above")
def test_python_of_the_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small data set of drawn photos instead of Debian's."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in PHOTOS:
        path = tmp_path / "data" / "sources" / "tuxpaint" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(64, 255, (48, 64, 3), np.uint8)).save(path)
    (tmp_path / "docs").mkdir()
    program = "\n".join(blocks(ROOT / "docs" / "library.md"))
    small = program.replace("sizes=[288]", "sizes=[96], train=40, val=20")
    assert small != program

    exec(compile(small, "library.md", "exec"), {"__name__": "library"})

    for name in ("library.jpg", "prototypes.jpg"):
        assert Image.open(tmp_path / "docs" / name).size > (200, 200)


def test_files_and_make_targets_exist() -> None:
    library = (ROOT / "docs" / "library.md").read_text()
    pages = re.findall(r"[^!]\[[^]]*\]\(([^)]+)\)", README)
    assert all((ROOT / name).is_file() for name in pages)
    pictures = re.findall(r"!\[[^]]*\]\((docs/[^)]+)\)", README)
    assert pictures
    pictures += [f"docs/{name}" for name in re.findall(r"!\[.*\]\((.+)\)", library)]
    for name in pictures:
        assert 10_000 < (ROOT / name).stat().st_size < 300_000
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in MAKEFILE


def test_api_pages_are_made_without_a_warning(tmp_path: Path) -> None:
    names = re.search(r"^API := \$\(addprefix lpcam\.,((?:.*\\\n)*.*)\)$", MAKEFILE, re.MULTILINE)
    modules = [f"lpcam.{name}" for name in names[1].replace("\\", "").split()]
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # pydantic's own annotation of its dataclasses, as in the Makefile.
        warnings.filterwarnings("ignore", ".* PydanticDataclass ")
        pdoc.pdoc(*modules, output_directory=tmp_path)
    for module in modules:
        page = (tmp_path / (module.replace(".", "/") + ".html")).read_text()
        assert not re.search(r":(class|func|meth|attr):`", page)
    explainer = (tmp_path / "lpcam" / "explain" / "explainer.html").read_text()
    assert 'href="../prototypes/prototype_set.html#Prototypes' in explainer
    assert "Upper bound on its iterations" in explainer
