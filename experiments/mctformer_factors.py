"""What each factor of MCTformer's maps scores on val, and where its patches look.

python experiments/mctformer_factors.py dataset=shapes dataset.train=1000 classifier=mctformer_small

Takes the classifier that train.py left for the same overrides. Pictures at their own size, not
mirrored; mIoU at each map's best threshold.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from lpcam.data.loaders import normalized, view_loader
from lpcam.evaluation.segmentation import SegmentationScore
from lpcam.functional import merge_scales, normalize_maps
from lpcam.hosts.mctformer import MCTformer, fused_maps, refined_maps
from lpcam.programs.folders import CONF
from lpcam.programs.setup import trained
from lpcam.prototypes.maps import HostViews
from lpcam.seeds.record import grid_size


@torch.no_grad()
def main(overrides: list[str]) -> None:
    """Print a line for each map."""
    os.environ.setdefault("LPCAM_PROJECT", str(CONF.parent))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("infer", ["paths.root=.", "paths.output=.", *overrides])
    found = trained(cfg, overrides)
    dataset, host = found.dataset, found.host.for_inference()
    assert isinstance(host, MCTformer)
    pictures = dataset.pictures(dataset.val_split)
    loader = view_loader(pictures, len(dataset.classes), scales=[1.0], flip=False)
    batches = [normalized(batch, host.backbone.mean, host.backbone.std) for batch in loader]
    views = [host.predict_step(batch, 0)[0] for batch in batches]
    count = host.num_classes

    def attention(view: HostViews) -> Tensor:
        return view.extra[0, 0, :count]

    def affinity(view: HostViews) -> Tensor:
        return view.extra[0, 0, count:].flatten(1)

    def patchcam(view: HostViews) -> Tensor:
        return host.own_maps(view.features[0])[0]

    def fused(view: HostViews) -> Tensor:
        return fused_maps(attention(view), patchcam(view), host.variant)

    def noise(view: HostViews) -> Tensor:
        return torch.rand(count, *view.features.shape[-2:])

    def score(make: Callable[[HostViews], Tensor]) -> float:
        total = SegmentationScore(count)
        for picture, batch, view in zip(pictures, batches, views, strict=True):
            classes = list(picture.labels or ())
            maps = normalize_maps(merge_scales([make(view)[classes]], grid_size(batch["size"])))
            whole = F.interpolate(maps[None], batch["size"], mode="bilinear")[0]
            total.update(whole, classes, dataset.mask(picture))
        return 100 * float(total.compute().miou.max())

    torch.manual_seed(0)
    makers = {"noise": noise, "attention": attention, "PatchCAM": patchcam, "product": fused}
    for name, make in makers.items():
        refined = score(lambda view, make=make: refined_maps(make(view), affinity(view)))
        print(f"{name:10s} {score(make):5.1f}   refined {refined:5.1f}")
    shares = [affinity(view) / affinity(view).sum(1, keepdim=True) for view in views]
    apart = [(share - share.mean(0)).abs().sum(1).mean() / 2 for share in shares]
    print(f"what two patches look at differs by {float(torch.stack(apart).mean()):.2f} of 1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
