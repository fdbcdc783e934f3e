# python experiments/localisation_peers.py experiments=voc_animals dataset.root=~/VOC2012
"""Maps of torchcam's and pytorch-grad-cam's methods, of CAM and of LPCAM, as localisation.

Takes the overrides of ``infer.py``, after its training; needs ``pip install lpcam[bench]``. Maps
are of one view at the picture's own size, of the same features of the same classifier. The other
packages get the part behind the features as their network, which gives the gradients that the whole
would. Prints MaxBoxAccV2 and PxAP on the last of the splits that get maps.
"""

import sys
from collections.abc import Callable

import pytorch_grad_cam
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.progress import track
from torch import Tensor, nn
from torchcam import methods

from lpcam.data.loaders import normalized, view_loader
from lpcam.evaluation.localisation import LocalisationCounts, count_pair
from lpcam.functional import normalize_maps
from lpcam.models.classifier import Classifier
from lpcam.programs.compose import infer_config
from lpcam.programs.run import Run
from lpcam.prototypes.head import PrototypeHead
from lpcam.prototypes.maps import Propagation, spread

GRID = 4  # pixels between two positions of the maps that the step is given


class Tail(nn.Module):
    """From local features ``(B, D, h, w)`` to scores, as the classifier has it.

    Args:
        head: The linear layer on their mean.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``(B, C)``."""
        return self.head(self.features(features).mean((2, 3)))


def of_torchcam(name: str, tail: Tail) -> Callable[[Tensor, int], Tensor]:
    """Makes maps by a method of torchcam."""
    options = {"fc_layer": "head"} if name == "CAM" else {}

    def make(features: Tensor, index: int) -> Tensor:
        with getattr(methods, name)(tail, "features", **options) as extract:
            scores = tail(features.clone().requires_grad_())
            return extract(index, scores)[0][0].detach()

    return make


def of_grad_cam(name: str, tail: Tail) -> Callable[[Tensor, int], Tensor]:
    """Makes maps by a method of pytorch-grad-cam."""

    def make(features: Tensor, index: int) -> Tensor:
        with getattr(pytorch_grad_cam, name)(tail, [tail.features]) as extract:
            given = features.clone().requires_grad_()
            return torch.from_numpy(extract(given, [ClassifierOutputTarget(index)])[0])

    return make


def main() -> None:
    """Print a line for each method."""
    run = Run(infer_config(sys.argv[1:], "outputs/peers"), [])
    host, dataset = run.host, run.dataset
    assert isinstance(host, Classifier)
    count, backbone = len(dataset.classes), host.backbone
    lpcam_head, step = PrototypeHead(run.prototypes), Propagation(3)
    tail = Tail(host.head).eval()
    makers = {f"torchcam {n}": of_torchcam(n, tail) for n in ("CAM", "GradCAMpp", "LayerCAM")}
    names = ("GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM", "EigenGradCAM")
    makers |= {f"pytorch-grad-cam {name}": of_grad_cam(name, tail) for name in names}
    ours = ("CAM", "LPCAM", "LPCAM and the step")
    totals = {name: LocalisationCounts.zero(count) for name in (*makers, *ours)}
    pictures = dataset.pictures(dataset.map_splits[-1])
    loader = view_loader(pictures, count, scales=[1.0], flip=False)
    both = zip(pictures, loader, strict=True)
    for picture, batch in track(both, "Pictures", total=len(pictures)):
        (image,) = normalized(batch, backbone.mean, backbone.std)["views"]
        with torch.no_grad():
            features, stage = backbone(image), backbone.stage(image)[0]
        mask, boxes = dataset.mask(picture), dataset.boxes(picture)
        size = [-(-side // GRID) for side in batch["size"]]
        for index in picture.labels or ():
            lpcam = lpcam_head.maps(features, torch.tensor([index]))
            whole = normalize_maps(F.interpolate(lpcam, size, mode="bilinear"))[0]
            maps = {name: make(features, index) for name, make in makers.items()}
            maps["CAM"] = host.own_maps(features, torch.tensor([index]))[0, 0].detach()
            maps["LPCAM"] = lpcam[0, 0]
            maps["LPCAM and the step"] = spread(whole, [features[0]], stage, step, size)[0]
            for name, found in maps.items():
                counts = count_pair(found.numpy(), index, count, mask, boxes.get(index, []))
                totals[name] += counts
    for name, total in totals.items():
        scores = total.metrics()
        print(f"| {name} | {100 * scores['max_box_acc_v2']:.1f} | {100 * scores['pxap']:.1f} |")
    print(f"{next(iter(totals.values())).boxed} pairs with boxes")


if __name__ == "__main__":
    main()
