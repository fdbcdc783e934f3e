"""Maps of one picture: LPCAM beside plain CAM, the published loop and other packages.

Every method gets the same network and the same tensor, and gives maps in 0..1 of the classes asked
for in the form that it has for them. "Prototype by prototype" is the way of the published code: a
prototype is tiled to the size of the features for each cosine map, and the maps' mean is taken.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.harness import (
    Method,
    Options,
    Row,
    add_memory,
    counts,
    in_precision,
    ratio,
    rounds,
    section,
    target,
    timed_rows,
)
from lpcam.explain.views import PAPER_VIEWS, view_features
from lpcam.functional import (
    class_activation_map,
    local_prototype_map,
    merge_scales,
    normalize_maps,
    prototype_directions,
)
from lpcam.models.backbones import build_backbone
from lpcam.models.classifier import Classifier

CLASSES, OWN, CONTEXT = 20, 10, 8
FORWARD, CAM, LPCAM, LOOP = "forward only", "CAM", "LPCAM", "LPCAM, prototype by prototype"
TORCHCAM, TORCHCAM_GRAD = "torchcam CAM", "torchcam GradCAM"
CAPTUM, GRADCAM = "captum LayerGradCam", "pytorch-grad-cam GradCAM"


class Case:
    """A network with random weights, a picture, and prototypes.

    Args:
        options: The options.
        present: Classes that are asked for.
        precision: What the network runs in.
    """

    def __init__(self, options: Options, present: int, precision: str = "fp32") -> None:
        torch.manual_seed(0)
        # Weights do not change what it costs; these need no file.
        backbone = build_backbone("resnet18" if options.quick else "resnet50", None)
        self.network = Classifier(backbone, CLASSES).eval().to(options.device)
        self.network.weight.abs_()  # no class's map is zero everywhere
        self.layer: nn.Module = backbone.network.layer4
        size = (64, 96) if options.quick else (375, 500)
        self.image = torch.randn(1, 3, *size, device=options.device)
        self.classes = list(range(present))
        self.weight = self.network.weight[:present]
        self.foreground = [self._prototypes(OWN) for _ in self.classes]
        self.context = [self._prototypes(CONTEXT) for _ in self.classes]
        self.directions = prototype_directions(self.foreground, self.context)
        self.precise = functools.partial(in_precision, precision, options.device)

    def _prototypes(self, count: int) -> Tensor:
        return torch.rand(count, self.network.backbone.dim).to(self.image)

    def features(self) -> Tensor:
        """Local features of the picture, of one forward pass."""
        return self.network.backbone(self.image)

    def of_views(self) -> list[Tensor]:
        """Mean features of the picture and its mirror image at four scales, of 8 views."""
        found = view_features(self.network.backbone, self.image, PAPER_VIEWS)
        return [views.mean(0) for views in found]

    def cam(self, features: Tensor) -> Tensor:
        """Plain CAM, rectified."""
        return class_activation_map(features, self.weight.to(features))

    def lpcam(self, features: Tensor) -> Tensor:
        """LPCAM from one direction a class, rectified."""
        return local_prototype_map(features, self.directions.to(features)).relu()

    def one_by_one(self, features: Tensor) -> Tensor:
        """LPCAM from a cosine map of each prototype, rectified."""
        height, width = features.shape[2:]

        def mean_cosine(prototypes: Tensor) -> Tensor:
            tiled = (p[:, None, None].repeat(1, height, width) for p in prototypes.to(features))
            return torch.stack([F.cosine_similarity(features[0], t, dim=0) for t in tiled]).mean(0)

        pairs = zip(self.foreground, self.context, strict=True)
        return torch.stack([mean_cosine(own) - mean_cosine(rest) for own, rest in pairs])[
            None
        ].relu()

    def plain(self, head: Any) -> Method:
        """Maps of a head from one forward pass."""

        def method() -> Tensor:
            with torch.inference_mode(), self.precise():
                return normalize_maps(head(self.features())[0], 0)

        return method

    def merged(self, head: Any) -> Method:
        """Maps of a head from 8 views, on a quarter of the picture's grid."""

        def method() -> Tensor:
            with torch.inference_mode(), self.precise():
                grid = [side // 4 for side in self.image.shape[2:]]
                maps = [head(features)[0] for features in self.of_views()]
                return normalize_maps(merge_scales(maps, (grid[0], grid[1])), 0)

        return method

    def forward(self) -> None:
        """The network alone."""
        with torch.inference_mode(), self.precise():
            self.network(self.image)

    def forward_views(self) -> None:
        """The network alone, for 8 views."""
        with torch.inference_mode(), self.precise():
            self.of_views()

    def torchcam(self) -> Tensor:
        """CAM by torchcam, as its page has it."""
        from torchcam import methods

        with methods.CAM(self.network, self.layer, self.network.head) as extractor:
            with torch.inference_mode(), self.precise():
                self.network(self.image)
            return _stacked([extractor(c, normalized=False)[0] for c in self.classes])

    def torchcam_grad(self) -> Tensor:
        """GradCAM by torchcam: one forward pass, gradients no further than the features."""
        from torchcam.methods import GradCAM

        with GradCAM(self.network, self.layer) as extractor:
            with self.precise():
                scores = self.network(self.image)
            last = self.classes[-1]
            found = [
                extractor(c, scores, normalized=False, retain_graph=c != last)[0]
                for c in self.classes
            ]
            return _stacked(found)

    def captum(self) -> Tensor:
        """GradCAM by captum, which runs the network for each class."""
        from captum.attr import LayerGradCam

        method = LayerGradCam(self.network, self.layer)
        with self.precise():
            found = [method.attribute(self.image, target=c)[0].detach() for c in self.classes]
        return _stacked(found)

    def grad_cam(self) -> Tensor:
        """GradCAM by pytorch-grad-cam, which runs the network both ways for each class."""
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with GradCAM(model=self.network, target_layers=[self.layer]) as method, self.precise():
            found = [
                torch.from_numpy(method(self.image, [ClassifierOutputTarget(c)]))
                for c in self.classes
            ]
        self.network.zero_grad()
        return torch.cat(found)


def _stacked(maps: Sequence[Tensor]) -> Tensor:
    # Gradients are those of a mean over positions, so these maps are small: nothing may be added to
    # their maximum.
    return normalize_maps(torch.cat(list(maps)).float(), 0)


def single_view(options: Options, present: int, precision: str = "fp32") -> dict[str, Method]:
    """Methods that make the maps of one picture from one view."""
    return methods_of(Case(options, present, precision))


def methods_of(case: Case) -> dict[str, Method]:
    """The same of a case that is there; those of packages that are installed."""
    peers = {
        "torchcam": {TORCHCAM: case.torchcam, TORCHCAM_GRAD: case.torchcam_grad},
        "captum": {CAPTUM: case.captum},
        "pytorch_grad_cam": {GRADCAM: case.grad_cam},
    }
    methods: dict[str, Method] = {
        FORWARD: case.forward,
        CAM: case.plain(case.cam),
        LPCAM: case.plain(case.lpcam),
        LOOP: case.plain(case.one_by_one),
    }
    for package, theirs in peers.items():
        if find_spec(package):
            importing = __import__(package)  # now, so that its memory is not its method's
            assert importing
            methods |= theirs
    return methods


def eight_views(options: Options, present: int, precision: str = "fp32") -> dict[str, Method]:
    """Methods that make the maps of one picture from 4 scales and their mirror images."""
    case = Case(options, present, precision)
    return {
        FORWARD: case.forward_views,
        CAM: case.merged(case.cam),
        LPCAM: case.merged(case.lpcam),
        LOOP: case.merged(case.one_by_one),
    }


def heads(options: Options, present: int) -> dict[str, Method]:
    """What follows on the features of 8 views, without the network."""
    case = Case(options, present)
    with torch.inference_mode():
        scales = case.of_views()

    def alone(head: Any) -> Method:
        def method() -> list[Tensor]:
            with torch.inference_mode():
                return [head(features) for features in scales]

        return method

    return {CAM: alone(case.cam), LPCAM: alone(case.lpcam), LOOP: alone(case.one_by_one)}


def check(case: Case) -> dict[str, float]:
    """How far maps that should be the same differ, the largest difference of each pair.

    LPCAM's are compared before they are divided by their maximum, as cosines: random weights give
    features so alike that what is left of their difference would be rounding. pytorch-grad-cam
    stretches its maps from 0 to 1 and to the picture's size; so is plain CAM here, by another
    program and with other rounding.

    Raises:
        AssertionError: They are not the same; nothing is worth measuring then.
    """
    found = {name: method() for name, method in methods_of(case).items()}
    cam = found[CAM]
    assert isinstance(cam, Tensor)
    bounds = {TORCHCAM: 1e-5, TORCHCAM_GRAD: 1e-5, CAPTUM: 1e-5, GRADCAM: 1e-3}
    different = {}
    for name, bound in bounds.items():
        theirs, ours = found.get(name), cam
        if not isinstance(theirs, Tensor):
            continue
        if name == GRADCAM:
            low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
            ours = F.interpolate(
                ((cam - low) / (high - low))[None], theirs.shape[1:], mode="bilinear"
            )
            low, high = ours.amin((2, 3), keepdim=True), ours.amax((2, 3), keepdim=True)
            ours = ((ours - low) / (high - low))[0].to(theirs)
        different[f"{name} and CAM"] = _difference(theirs, ours, bound, name)
    with torch.inference_mode(), case.precise():
        features = case.features()
        ours, loop = case.lpcam(features), case.one_by_one(features)
    different["LPCAM and prototype by prototype"] = _difference(ours, loop, 2e-6, LPCAM)
    return different


def _difference(first: Tensor, second: Tensor, bound: float, name: str) -> float:
    largest = float((first - second).abs().max())
    assert largest <= bound, f"{name}: maps differ by {largest:.1e}"
    return largest


def table(options: Options) -> list[Row]:
    """One view of two and of all classes, 8 views, and heads alone."""
    sections = []
    for precision in options.precisions:
        sections += [_single(options, present, precision) for present in (2, CLASSES)]
        sections.append(_eight(options, precision))
    return [*sections, _alone(options)]


def _text(options: Options, what: str) -> str:
    network = "ResNet-18, 64x96 pixels" if options.quick else "ResNet-50, stride 16, 375x500 pixels"
    return f"{network}, random weights; {what}; {OWN} + {CONTEXT} prototypes a class."


def _single(options: Options, present: int, precision: str) -> Row:
    case = Case(options, present, precision)
    text = _text(options, f"maps of {present} classes")
    if present == 2:
        same = ", ".join(f"{k} {v:.0e}" for k, v in check(Case(options, present)).items())
        text += f" Largest differences of the maps in single precision: {same}."
    methods = methods_of(case)
    # Counting is the warm-up.
    done = {name: counts(methods[name], case.network.backbone, case.network) for name in methods}
    seconds = rounds(
        methods, 3 if options.quick else 7, warm_up=0, least=2, budget=10.0, settle=options.settle
    )
    rows = timed_rows(seconds, FORWARD)
    for row in rows:
        row |= asdict(done[row["name"]])
    if present == 2:
        add_memory(rows, "head:single_view", options, present=present, precision=precision)
    targets = [
        target("LPCAM / CAM", ratio(seconds[LPCAM], seconds[CAM]), most=1.02),
        target("LPCAM / forward only", ratio(seconds[LPCAM], seconds[FORWARD]), most=1.05),
    ]
    if TORCHCAM in seconds:
        theirs = ratio(seconds[LPCAM], seconds[TORCHCAM])
        targets.append(target("LPCAM / torchcam CAM", theirs, most=1.0))
    title = f"One view, {present} classes, {precision}"
    return section(title, text, rows, targets=targets, control=seconds[FORWARD])


def _eight(options: Options, precision: str) -> Row:
    methods = eight_views(options, 2, precision)
    seconds = rounds(methods, 3, warm_up=1, settle=options.settle)
    rows = timed_rows(seconds, FORWARD)
    add_memory(rows[-2:], "head:eight_views", options, present=2, precision=precision)
    return section(
        f"8 views, 2 classes, {precision}",
        _text(options, "scales 0.5, 1, 1.5 and 2 with mirror images, 2 classes"),
        rows,
        targets=[target("LPCAM / CAM", ratio(seconds[LPCAM], seconds[CAM]), most=1.02)],
        control=seconds[FORWARD],
    )


def _alone(options: Options) -> Row:
    seconds = rounds(heads(options, 2), 9, warm_up=1, budget=12.0, settle=options.settle)
    faster = ratio(seconds[LOOP], seconds[LPCAM])
    return section(
        "The head alone, 8 views, 2 classes",
        _text(options, "from the features of 8 views to the maps of 4 scales, 2 classes"),
        timed_rows(seconds),
        targets=[target("prototype by prototype / LPCAM", faster, least=80)],
        control=seconds[LOOP],
    )
