import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from lpcam import LPCAM
from lpcam.data.transforms import normalize
from lpcam.models.backbones import build_backbone
from tests.conftest import ROOT

testing = pytest.importorskip("streamlit.testing.v1", reason="needs the extra 'demo'")
PAGE = ROOT / "lpcam" / "explain" / "page.py"
CAT, TABBY = 281, 282


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo, and prototypes of two classes under ImageNet's weights."""
    folder = tmp_path_factory.mktemp("demo")
    picture = Image.fromarray(data.chelsea()).resize((160, 96))
    picture.save(folder / "cat.png")
    backbone = build_backbone("efficientnet_lite0")
    names = [f"class {c}" for c in range(1000)]
    cam = LPCAM(backbone.network, k=5, class_score=0.0, classes=names, example=(3, 64, 64))
    labels = torch.zeros(1, 1000)
    labels[0, [CAT, TABBY]] = 1
    images = normalize(picture, backbone.mean, backbone.std)[None]
    cam.fit([(images, labels)], progress=False).save(folder / "prototypes.safetensors")
    return folder


def open_page(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> "testing.AppTest":
    given = {"model": "efficientnet_lite0", "prototypes": f"{folder / 'prototypes.safetensors'}"}
    arguments = [f"--{name}={value}" for name, value in (given | options).items()]
    monkeypatch.setattr(sys, "argv", [str(PAGE), *arguments])
    return testing.AppTest.from_file(PAGE, default_timeout=120).run()


def captions(page: "testing.AppTest") -> list[str]:
    return [text for image in page.image for text in image.captions]


def test_an_uploaded_picture_is_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page(folder, monkeypatch)
    assert not page.exception
    assert not captions(page)

    page.file_uploader[0].upload("cat.png", (folder / "cat.png").read_bytes(), "image/png").run()

    assert not page.exception
    (best,) = page.multiselect[0].value
    assert best in (CAT, TABBY)
    shown = captions(page)
    assert shown[:4] == ["Picture", "CAM", "LPCAM", "LPCAM above 0.50"]
    assert [text.partition(":")[0] for text in shown[4:]] == ["0", "1", "2", "3", "4"]
    assert all(0 < float(text.partition(":")[2]) <= 1 for text in shown[4:])

    page.multiselect[0].set_value([CAT, TABBY])
    page.slider[0].set_value(0.25).run()

    assert [header.value for header in page.header] == ["class 281", "class 282"]
    assert captions(page).count("LPCAM above 0.25") == 2


@pytest.mark.parametrize("fault", ["prototypes", "picture"])
def test_a_mistake_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "prototypes":
        page = open_page(folder, monkeypatch, prototypes="none.safetensors")
    else:
        page = open_page(folder, monkeypatch)
        page.file_uploader[0].upload("cat.png", b"no picture", "image/png").run()
    assert not page.exception
    (error,) = page.error
    assert error.value.startswith("error: ")
    assert "no readable file" in error.value or "not a readable image" in error.value


def test_the_page_is_served_on_this_machine_until_it_is_interrupted(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lpcam", "demo", "--model=efficientnet_lite0",
               f"--prototypes={folder / 'prototypes.safetensors'}", f"--port={port}"]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in server.stdout:
            if f"http://localhost:{port}" in line:
                break
        with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health") as answer:
            assert answer.read() == b"ok"
    finally:
        os.killpg(server.pid, signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors
