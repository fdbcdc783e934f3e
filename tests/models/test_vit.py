"""A tiny ViT with random weights as a frozen host, through both programs."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from lpcam.prototypes.centers import Centers
from lpcam.prototypes.prototype_set import Prototypes
from tests.conftest import Outcome, at, unpacked

OPTIONS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.filterwarnings("ignore:.* no prototype scores above")
def test_through_the_programs(tmp_path: Path, program: Callable[..., Outcome]) -> None:
    torch.manual_seed(5)
    network = timm.create_model("vit_small_patch16_224", pretrained=False, **OPTIONS)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    overrides = (
        "dataset=shapes",
        "dataset.train=12",
        "dataset.val=4",
        "dataset.sizes=[50,60]",
        "trainer=cpu",
        "logger=none",
        "num_workers=0",
        "classifier=vit",
        "classifier.epochs=10",
        "backbone.name=vit_small_patch16_224",
        f"backbone.weights={tmp_path / 'vit.safetensors'}",
        *(f"+backbone.options.{name}={value}" for name, value in OPTIONS.items()),
    )
    trained = program("train", *overrides, *at(tmp_path, "train"))
    assert trained.status == 0, trained.stderr
    infer = (*overrides, "prototypes.k=2", "inference.scales=[1.0]", "report=false")
    made = program("infer", *infer, *at(tmp_path, "center"))
    assert made.status == 0, made.stderr

    prototypes = Prototypes.load(tmp_path / "center" / "prototypes.safetensors")
    assert prototypes.settings["signed"] == "center"
    assert prototypes.mean is not None
    stages = (tmp_path / "store" / "features").glob("*/")
    local = [np.load(io.BytesIO(data)) for stage in stages for data in unpacked(stage).values()]
    means = [file["local"].astype(np.float64).mean((0, 1)) for file in local if "local" in file]
    np.testing.assert_allclose(prototypes.mean, np.mean(means, 0), rtol=0, atol=1e-3)
    (centres,) = (tmp_path / "store" / "centers").glob("*/centers.safetensors")
    assert Centers.load(centres).signed == "center"

    kept = program("infer", *infer, "prototypes.signed=keep", *at(tmp_path, "keep"))
    assert kept.status == 0, kept.stderr
    assert Prototypes.load(tmp_path / "keep" / "prototypes.safetensors").mean is None
    scores = [
        json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("center", "keep")
    ]
    assert scores[0]["val/cam/miou"] == scores[1]["val/cam/miou"]
    assert scores[0]["val/lpcam/miou"] != scores[1]["val/lpcam/miou"]
