"""What each factor of MCTformer's maps scores on val, beside maps that took no network.

python experiments/mctformer_factors.py dataset=shapes dataset.train=1000 classifier=mctformer_small

Takes the classifier that train.py left for the same overrides. Pictures at their own size, not
mirrored; mIoU at each map's best threshold. Without a network: noise, the same blob in the middle
of every picture and, of drawn creatures, their exact heads.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import SegmentationDataset
from lpcam.data.loaders import normalized, view_loader
from lpcam.data.shapes import HEAD, Shapes
from lpcam.evaluation.segmentation import SegmentationScore
from lpcam.functional import merge_scales, normalize_maps
from lpcam.hosts.mctformer import MCTformer, fused_maps, refined_maps
from lpcam.programs.compose import infer_config
from lpcam.programs.setup import trained
from lpcam.prototypes.maps import HostViews
from lpcam.seeds.record import grid_size

Maker = Callable[[HostViews], Tensor]  # maps (C, h, w) of a picture's only view


class Factors:
    """The parts that a trained MCTformer's maps are made of.

    Args:
        host: The network.
    """

    def __init__(self, host: MCTformer) -> None:
        self.host = host

    def attention(self, view: HostViews) -> Tensor:
        """What each class token looks at."""
        return view.extra[0, 0, : self.host.num_classes]

    def patchcam(self, view: HostViews) -> Tensor:
        """The head on patch tokens."""
        return self.host.own_maps(view.features[0])[0]

    def product(self, view: HostViews) -> Tensor:
        """Both, as its own maps have them."""
        return fused_maps(self.attention(view), self.patchcam(view), self.host.variant)

    def affinity(self, view: HostViews) -> Tensor:
        """What each patch looks at."""
        return view.extra[0, 0, self.host.num_classes :].flatten(1)

    def noise(self, view: HostViews) -> Tensor:
        """Chance."""
        return torch.rand(self.host.num_classes, *view.features.shape[-2:])

    def blob(self, view: HostViews) -> Tensor:
        """A Gaussian in the middle, of a quarter of the picture's sides."""
        rows, columns = (torch.linspace(-0.5, 0.5, side) for side in view.features.shape[-2:])
        one = (-(rows[:, None] ** 2 + columns**2) / (2 * 0.25**2)).exp()
        return one.expand(self.host.num_classes, -1, -1)


def scorer(dataset: SegmentationDataset, host: MCTformer) -> tuple[list[HostViews], Callable]:
    """The views of val's pictures, and what scores maps that are made of them."""
    pictures = dataset.pictures(dataset.val_split)
    loader = view_loader(pictures, len(dataset.classes), scales=[1.0], flip=False)
    batches = [normalized(batch, host.backbone.mean, host.backbone.std) for batch in loader]
    views = [host.predict_step(batch, 0)[0] for batch in batches]

    def score(make: Maker) -> float:
        total = SegmentationScore(host.num_classes)
        for picture, batch, view in zip(pictures, batches, views, strict=True):
            classes = list(picture.labels or ())
            maps = normalize_maps(merge_scales([make(view)[classes]], grid_size(batch["size"])))
            whole = F.interpolate(maps[None], batch["size"], mode="bilinear")[0]
            total.update(whole, classes, dataset.mask(picture))
        return 100 * float(total.compute().miou.max())

    return views, score


def exact_heads(dataset: Shapes) -> float:
    """MIoU of maps that are 1 on the heads of val's creatures."""
    total = SegmentationScore(len(dataset.classes))
    for picture in dataset.pictures(dataset.val_split):
        classes, mask = list(picture.labels or ()), dataset.mask(picture)
        parts = np.asarray(Image.open(dataset.root / "Parts" / f"{picture.id}.png"))
        heads = np.stack([(mask == index + 1) & (parts == HEAD) for index in classes])
        total.update(torch.from_numpy(heads).float(), classes, mask)
    return 100 * float(total.compute().miou.max())


@torch.no_grad()
def main(overrides: list[str]) -> None:
    """Print a line for each map."""
    found = trained(infer_config(overrides, "outputs/factors"), overrides)
    host = found.host.for_inference()
    assert isinstance(host, MCTformer)
    factors = Factors(host)
    views, score = scorer(found.dataset, host)
    torch.manual_seed(0)
    print(f"noise      {score(factors.noise):5.1f}")
    print(f"blob       {score(factors.blob):5.1f}")
    if isinstance(found.dataset, Shapes):
        print(f"heads      {exact_heads(found.dataset):5.1f}")
    for name in ("attention", "patchcam", "product"):
        make: Maker = getattr(factors, name)
        refined = score(lambda view, make=make: refined_maps(make(view), factors.affinity(view)))
        print(f"{name:10s} {score(make):5.1f}   refined {refined:5.1f}")
    looks = [factors.affinity(view) for view in views]
    shares = [look / look.sum(1, keepdim=True) for look in looks]
    apart = [(share - share.mean(0)).abs().sum(1).mean() / 2 for share in shares]
    print(f"what two patches look at differs by {float(torch.stack(apart).mean()):.2f} of 1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
