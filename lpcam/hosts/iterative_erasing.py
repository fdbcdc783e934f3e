"""Iterative erasing: what a class's map still finds once its strongest places are erased.

The simple case of Wei et al., "Object Region Mining with Adversarial Erasing", CVPR 2017: one
classifier looks again and again, where theirs is trained anew on the erased pictures each time.
"""

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.hosts.remade import RemadeMaps
from lpcam.models.host import Host, mirrored_back
from lpcam.settings import CHECKED, Count, Share


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class Looks:
    """How often is looked, and what is erased in between.

    Attributes:
        looks: How often; 1 gives the host's own maps.
        strong: Share of a map's maximum from which on a place is erased.
    """

    looks: Count = 3
    strong: Share = 0.8


def look_again(host: Host, views: Tensor, labels: Tensor, class_index: int, how: Looks) -> Tensor:
    """The largest own map of a class over several looks, each without the last one's strong places.

    Args:
        host: Any host.
        views: Normalised views of a picture and of its mirror image ``(V, 3, H, W)``, in which 0 is
            the mean colour; V may be 1. What is strong is decided for both together.
        labels: The picture's labels ``(C,)``.
        class_index: The class.
        how: Settings.

    Returns:
        The map of each view, mirrored back ``(V, h, w)``.
    """
    largest = None
    for _ in range(how.looks):
        own = host.own_maps(host.local_features(views, labels.expand(len(views), -1)))
        found = mirrored_back(own[:, class_index])
        largest = found if largest is None else torch.maximum(largest, found)
        joint = found.sum(0)
        if not joint.any():  # nothing is left, and all of it would be erased
            break
        kept = (joint < how.strong * joint.max()).to(views)
        whole = F.interpolate(kept[None, None], views.shape[2:])[0]
        views = views * mirrored_back(whole.expand(len(views), 1, -1, -1))
    assert largest is not None
    return largest


class IterativeErasing(RemadeMaps):
    """A trained host whose own maps are those of :func:`look_again`."""

    title = "Erasing"
    settings = Looks

    def remake(self, views: Tensor, labels: Tensor, class_index: int, width: int) -> Tensor:
        """See :func:`look_again`."""
        return look_again(self.host, views, labels, class_index, self.how)
