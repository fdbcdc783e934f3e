"""AdvCAM: maps of pictures that climb up the score of a class (anti-adversarial climbing).

Lee et al., "Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic
Segmentation", CVPR 2021.
"""

from typing import Annotated

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from lpcam.hosts.remade import RemadeMaps
from lpcam.models.host import Host, mirrored_back
from lpcam.settings import CHECKED, Count, Rate, Share

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


class AdvCAM(RemadeMaps):
    """A trained host whose own maps are those of climbing pictures.

    It takes a forward and a backward pass for each step, class and scale.
    """

    needs_gradients = True
    title = "AdvCAM"
    settings = Climbing

    def remake(self, views: Tensor, labels: Tensor, class_index: int, width: int) -> Tensor:
        """See :func:`climb`."""
        small = views.shape[3] <= SMALL * width + 0.5
        steps = max(self.how.steps // 2, 1) if small else self.how.steps
        with torch.enable_grad():
            climbed = climb(self.host, views, labels, class_index, self.how, steps)
        return climbed * (2 if small else 1)
