"""How much memory clustering takes at the size of VOC, and how many classes it holds at once."""

import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lpcam.prototypes.centers import Clustering, fit_centers
from lpcam.prototypes.class_head import LinearHead
from lpcam.prototypes.local_features import LocalFeatures, split_features
from tests.conftest import ROOT

# VOC's "person": 443 pictures of 24 x 32 positions, 2,048 channels.
PERSON = """
import re
from pathlib import Path
import numpy as np
import torch
from lpcam.prototypes.centers import Clustering, fit_centers
from lpcam.prototypes.class_head import LinearHead

torch.set_num_threads(1)
noise = np.random.default_rng(0).random((1024, 2048), np.float32).astype(np.float16)

def read(index):
    return noise[index % 256 : index % 256 + 768].reshape(24, 32, 2048)

def read_map(index, class_index):
    return np.linspace(1, 0, 768, dtype=np.float32).reshape(24, 32)

centers = fit_centers(
    read, np.ones((443, 1)), LinearHead(torch.ones(1, 2048)), ["person"],
    Clustering(k=12, activation=0.7, split="multi_scale", init="random", max_iter=2),
    dim=2048, read_map=read_map,
)
# Not ru_maxrss, which starts with what the process had that started this one.
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(centers.counts.sum()), int(peak) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_voc_person_in_3_gb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PERSON], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows, peak = map(int, done.stdout.split())
    assert rows == 443 * 768  # 340,224 features, 1.4 GB in half precision
    assert peak < 3e9


def test_coco_never_holds_more_than_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the features of a class are read, those of all classes before it are gone."""
    classes, each, channels = 80, 3, 7
    rng = np.random.default_rng(1)
    labels = np.repeat(np.eye(classes, dtype=np.float32), each, 0)
    collected: list[weakref.ref[Tensor]] = []
    left_over = []

    def split(*arguments: Any, **options: Any) -> tuple[LocalFeatures, LocalFeatures]:
        left_over.append(sum(rows() is not None for rows in collected))
        sides = split_features(*arguments, **options)
        collected.extend(weakref.ref(side.rows) for side in sides)
        return sides

    monkeypatch.setattr("lpcam.prototypes.centers.split_features", split)
    fitted = fit_centers(
        lambda index: rng.random((5, 6, channels), np.float32).astype(np.float16),
        labels,
        LinearHead(torch.from_numpy(rng.random((classes, channels), np.float32))),
        [str(c) for c in range(classes)],
        Clustering(k=2, activation=0.8),
        dim=channels,
    )
    assert int(fitted.counts.sum()) == classes * each * 30
    assert left_over == [0] * classes
