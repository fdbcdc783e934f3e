# python experiments/benchmark_head.py   writes experiments/benchmark_head.md
"""How long the LPCAM head takes beside plain CAM's, on the features of one forward pass.

Rounds are interleaved and their order rotates; the median of each is reported. "One by one" is the
way of the published code: a cosine map for every prototype, then their mean.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lpcam.functional import class_activation_map, local_prototype_map, prototype_directions
from lpcam.models.backbones import build_backbone

ROUNDS, CLASSES, OWN, CONTEXT = 15, 2, 10, 8


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet50", help="random weights will do")
    backbone = build_backbone(parser.parse_args().backbone, None).eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, 375, 500)
    weight = torch.randn(CLASSES, backbone.dim)
    foreground = [torch.rand(OWN, backbone.dim) for _ in range(CLASSES)]
    context = [torch.rand(CONTEXT, backbone.dim) for _ in range(CLASSES)]
    directions = prototype_directions(foreground, context)

    def one_by_one(features: torch.Tensor) -> None:
        for mine, others in zip(foreground, context, strict=True):
            for prototypes in (mine, others):
                cosine = [F.cosine_similarity(features, p[None, :, None, None]) for p in prototypes]
                torch.stack(cosine).mean(0)

    heads: dict[str, Callable[[torch.Tensor], object]] = {
        "no head": lambda features: None,
        "CAM": lambda features: class_activation_map(features, weight),
        "LPCAM": lambda features: local_prototype_map(features, directions),
        "LPCAM, one by one": one_by_one,
    }
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    with torch.inference_mode():
        for turn in range(ROUNDS + 3):
            names = list(heads)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                heads[name](backbone(image))
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
    median = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    rows = [
        "`python experiments/benchmark_head.py`",
        "",
        f"{backbone.name}, 375x500, one view, {CLASSES} classes, {OWN} + {CONTEXT} prototypes; "
        f"median of {ROUNDS} interleaved rounds. {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}.",
        "",
        "| | seconds, forward pass included | relative to CAM |",
        "|---|---|---|",
        *(f"| {name} | {t:.4f} | {t / median['CAM']:.3f} |" for name, t in median.items()),
    ]
    print("\n".join(rows))
    Path(__file__).with_suffix(".md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
