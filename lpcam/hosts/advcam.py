"""AdvCAM: maps of pictures that climb up the score of a class (anti-adversarial climbing).

Lee et al., "Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic
Segmentation", CVPR 2021.
"""

from dataclasses import asdict
from typing import Annotated, Any, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from lpcam.data.loaders import ViewBatch
from lpcam.models.host import Host, mirrored_back
from lpcam.prototypes.maps import HostViews
from lpcam.settings import CHECKED, Count, Rate, Share, make
from lpcam.storage.hashing import digest

SMALL = 0.5  # the scale that climbs half as often, its maps counted twice


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Climbing:
    """How pictures climb.

    Attributes:
        steps: Steps a class and scale, T; half of them at scale 0.5, where maps count twice.
        step_size: The largest change of a value in one step, in deviations of the channel.
        regularization: What the change of already strong places costs, the paper's lambda.
        strong: Share of the maximum above which a place is strong, the paper's tau.
    """

    steps: Count = 27
    step_size: Rate = 0.08
    regularization: Annotated[float, Field(ge=0)] = 7.0
    strong: Share = 0.5


def climb(
    host: Host, views: Tensor, labels: Tensor, class_index: int, how: Climbing, steps: int
) -> Tensor:
    """Sum of the maps of a class while a picture climbs, a view and its mirror image jointly.

    Each step ascends ``2 y_c - sum_k y_k - lambda sum |A_t - A_0|``, the last sum over places where
    the map A_t exceeds a share of its maximum. A_t is the host's own map of the class, of all views
    together; of a linear head that is the published Grad-CAM. y_k is the mean of the own map of any
    class k: of a linear head the mean of the rectified scores. A value of the picture changes by
    ``step_size * gradient / max |gradient|`` and stays in the range that its values had.

    Args:
        host: Any host whose own maps can be differentiated.
        views: A picture and its mirror image ``(V, 3, H, W)``; V may be 1.
        labels: The picture's labels ``(C,)``, for hosts whose features depend on them.
        class_index: The class.
        how: Settings.
        steps: How often.

    Returns:
        The sum of each view's maps, mirrored back ``(V, h, w)``.
    """
    low, high = views.min(), views.max()
    total: Tensor | float = 0.0
    start = None
    for _ in range(steps):
        views = views.detach().requires_grad_()
        own = host.own_maps(host.local_features(views, labels.expand(len(views), -1)))
        found = mirrored_back(own[:, class_index])
        total = total + found.detach()
        joint = found.sum(0)
        start = joint.detach() if start is None else start
        strong = joint > how.strong * joint.max()
        means = own.mean((2, 3)).sum(0)
        change = ((joint - start).abs() * strong).sum()
        gain = 2 * means[class_index] - means.sum() - how.regularization * change
        (gradient,) = torch.autograd.grad(gain, views)
        step = how.step_size * gradient / gradient.abs().max().clamp_min(1e-12)
        views = (views + step).clamp(low, high)
    return torch.as_tensor(total)


class AdvCAM(Host):
    """A trained host whose own maps are those of climbing pictures; all else stays.

    It takes a forward and a backward pass for each step, class and scale. Only classes that a
    picture shows have maps.

    Args:
        host: The trained host.
        **options: See :class:`Climbing`.
    """

    maps_from_features = False
    needs_gradients = True
    title = "AdvCAM"

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host.backbone, host.num_classes)
        self.host = host.requires_grad_(False)
        self.climbing = make(Climbing, options, "maps.{}".format)
        self.precision = host.precision
        self.finishes = host.finishes

    def local_features(self, images: Tensor, labels: Tensor) -> Tensor:  # noqa: D102 - inherited
        return self.host.local_features(images, labels)

    def own_maps(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """The host's own maps, before any step."""
        return self.host.own_maps(features, classes)

    def score(self, vectors: Tensor) -> Tensor:
        """The host's scores."""
        return self.host.score(vectors)

    @property
    def score_key(self) -> str:
        """Hash of the host's, and of how pictures climb."""
        return digest([self.host.score_key, asdict(self.climbing)])

    @property
    def feature_key(self) -> str:
        """The host's: features are those of pictures as they are."""
        return self.host.feature_key

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> list[HostViews]:
        """Features of the pictures as they are, and maps of what becomes of them."""
        scales = []
        found = self.host.predict_step(batch, batch_idx)
        for images, views in zip(batch["views"], found, strict=True):
            small = images.shape[3] <= SMALL * batch["size"][1] + 0.5
            steps = max(self.climbing.steps // 2, 1) if small else self.climbing.steps
            assert views.maps is not None
            maps = torch.zeros_like(views.maps)
            for b, c in batch["labels"].nonzero().tolist():
                both = [images[b], images[b].flip(2)][: len(maps)]
                with torch.enable_grad():
                    climbed = climb(
                        self.host, torch.stack(both), batch["labels"][b], c, self.climbing, steps
                    )
                maps[:, b, c] = climbed * (2 if small else 1)
            scales.append(views._replace(maps=maps))
        return scales

    def finish(self, maps: Tensor, views: HostViews, classes: Tensor) -> Tensor:
        """What the host does."""
        return self.host.finish(maps, views, classes)

    def for_inference(self) -> Self:  # noqa: D102 - inherited
        return type(self)(self.host.for_inference(), **asdict(self.climbing)).eval()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The host's: there is nothing else to load."""
        return self.host.state_dict(*args, **options)
