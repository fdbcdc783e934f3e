"""Files and configs of strangers: refused, with a line that names them, and without doing harm."""

import io
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from lpcam.__main__ import main
from lpcam.errors import InputError
from lpcam.models.weights import load_state
from lpcam.programs.build import check_targets
from lpcam.prototypes.prototype_set import Prototypes
from lpcam.refiners.sam import read_masks
from lpcam.seeds.record import load_seed
from tests.conftest import TINY, Outcome, at
from tests.malice import Malicious


def npy(shape: tuple[int, ...], content: bytes = b"", kind: str = "|b1") -> bytes:
    """An array's file with a header that may promise what is not there."""
    buffer = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


def bomb(path: Path, name: str) -> None:
    """1.2 GB in a file of a megabyte."""
    block = bytes(10**7)
    with (
        ZipFile(path, "w", ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        file.write(npy((120, 10**4, 10**3)))
        for _ in range(120):
            file.write(block)


def objects(path: Path, name: str) -> None:
    np.savez(path, **{name.removesuffix(".npy"): np.array([Malicious(path.parent / "harm")])})


def promise(path: Path, name: str) -> None:
    with ZipFile(path, "w") as archive:
        archive.writestr(name, npy((10**6, 10**6, 10**3)))


def deep(path: Path, name: str) -> None:
    header = b"{'shape':" + b"(" * 400 + b")" * 400 + b"}\n"
    with ZipFile(path, "w") as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


@pytest.mark.parametrize("write", [bomb, objects, promise, deep])
def test_arrays(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "a.npz"
    for name, read in (("masks.npy", lambda p: read_masks(p, (4, 4))), ("maps.npy", load_seed)):
        write(path, name)
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: not ")
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


HEADERS = {
    "longer than the file": struct.pack("<Q", 10**9) + b"{}",
    "longer than any": struct.pack("<Q", 2**63) + b"{}",
    "a tensor of 4 EB": {"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
    "out of the file": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}},
    "backwards": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "metadata that is no text": {"__metadata__": {"schema": ["3"]}},
    "not JSON": b"\x02\0\0\0\0\0\0\0[}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
@pytest.mark.parametrize("load", [Prototypes.load, load_state])
def test_safetensors(tmp_path: Path, header: Any, load: Any) -> None:
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + bytes(4)
    path = tmp_path / "w.safetensors"
    path.write_bytes(header)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "hydra.utils.instantiate",
        "lpcam.storage.store.shutil.rmtree",
        "lpcam.storage.store.prune",  # a function of ours that deletes
        "lpcam.storage.files.write_atomically",
        "lpcam.programs.done.clear",
        "pytorch_lightning.seed_everything",
        "pytorch_lightning.LightningModule.load_from_checkpoint",
        "pytorch_lightning.cli.LightningCLI",
        "${oc.env:HOME}",
        "lpcam",
        3,
    ],
)
def test_only_classes_are_called(target: Any) -> None:
    for value in ({"_target_": target}, {"a": [{"b": {"_target_": target, "x": 1}}]}):
        with pytest.raises(InputError, match=r"^_target_=") as caught:
            check_targets(value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def configs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "configs"
    (folder / "experiments").mkdir(parents=True)
    yield folder
    GlobalHydra.instance().clear()


def only_line(outcome: Outcome) -> str:
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


STUDIES = {
    "callback": "hydra: {callbacks: {mine: {_target_: os.mkdir, path: HARM}}}",
    "callback of ours": "hydra: {callbacks: {mine: {_target_: lpcam.storage.files.write_atomically,"
    " path: {_target_: pathlib.Path, _args_: [HARM]}, data: harm}}}",
    "launcher": "hydra: {launcher: {_target_: os.mkdir, path: HARM}}",
    "nested": "trainer: {callbacks: [{_target_: os.mkdir, path: HARM}]}",
    "secret": "backbone: {name: '${oc.env:WANDB_API_KEY}'}",
    "secret in parts": "backbone: {name: '${oc.env:${classifier.optimizer}}'}",
    "unknown resolver": "backbone: {name: '${shell:touch HARM}'}",
    "python": "a: !!python/object/apply:os.mkdir [HARM]",
}


@pytest.mark.parametrize("text", STUDIES.values(), ids=STUDIES.keys())
@pytest.mark.parametrize("option", ["--config-dir={}", "-cd {}"])
def test_a_config_of_a_stranger(
    program: Any,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    option: str,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    harm = tmp_path / "harm"
    study = configs / "experiments" / "theirs.yaml"
    study.write_text(f"# @package _global_\n{text.replace('HARM', str(harm))}\n")
    words = (*option.format(configs).split(" "), "experiments=theirs", *TINY, *at(tmp_path))
    for name in ("train", "infer"):
        line = only_line(program(name, *words))
        assert "refused" in line or "shell" in line or "theirs" in line
        assert "0" * 40 not in line
    assert not harm.exists()
    assert not any("0" * 40 in path.read_text() for path in tmp_path.rglob("*.yaml"))


def test_a_config_of_ones_own_is_used(program: Any, configs: Path, tmp_path: Path) -> None:
    """Otherwise the lines above would say nothing."""
    study = configs / "experiments" / "mine.yaml"
    study.write_text("# @package _global_\nbackbone: {name: '${oc.env:LPCAM_MINE}'}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPCAM_MINE", "no_such_net")
        words = (f"--config-dir={configs}", "experiments=mine", *TINY, *at(tmp_path))
        assert "backbone.name=no_such_net: unknown" in only_line(program("train", *words))


@pytest.mark.parametrize(
    "override", ["hydra.job.env_set.A=1", "+hydra.callbacks.x._target_=os.mkdir", "--config-dir=x"]
)
def test_a_run_of_a_stranger_cannot_start_anything_by_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(json.dumps(["prototypes.k=3", override]))
    before = list(sys.argv)
    assert main(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{override}: refused" in line
    assert sys.argv == before
