"""How IRN's layers learn."""

import torch
from torch import Tensor

from lpcam.models.backbones import Backbone
from lpcam.refiners.heads import HeadTraining, stage_channels
from lpcam.refiners.irn.network import RelationNetwork
from lpcam.refiners.pairs import PairLabels, affinity_loss, mean_where, pair_labels
from lpcam.refiners.random_walk import at_offset, edge_affinity, pair_offsets


def displacement_loss(displacement: Tensor, pairs: PairLabels, radius: int) -> Tensor:
    """How far differences of displacements are from what they should be (IRN, Eq. 8 and 9).

    Two cells of one object point to the same place, so theirs differ by the way from one to the
    other; two cells of background have the same.

    Args:
        displacement: ``(B, 2, h, w)``.
        pairs: What is known of the pairs.
        radius: Their radius.

    Returns:
        Mean absolute error over the foreground pairs, plus that over the background pairs.
    """
    offsets = pair_offsets(radius)
    first = at_offset(displacement, (0, 0), radius)
    difference = torch.stack([first - at_offset(displacement, o, radius) for o in offsets], 2)
    wanted = torch.tensor(offsets).to(difference).T[:, :, None, None]
    foreground = (difference - wanted).abs().mean(1)
    background = difference.abs().mean(1)
    return mean_where(foreground, pairs.foreground) + mean_where(background, pairs.background)


class RelationTraining(HeadTraining):
    """Learns boundaries and displacements.

    Args:
        backbone: The backbone.
        radius: Of the pairs, in cells of the stride-4 grid.
        lr: Learning rate of the boundary's layers; those of the displacements have ten times that.
        weight_decay: Weight decay.
    """

    head: RelationNetwork

    def __init__(
        self, backbone: Backbone, *, radius: int, lr: float, weight_decay: float = 1e-4
    ) -> None:
        head = RelationNetwork(stage_channels(backbone))
        edge = [*head.edge_branches.parameters(), *head.edge_out.parameters()]
        ids = {id(parameter) for parameter in edge}
        others = [parameter for parameter in head.parameters() if id(parameter) not in ids]
        groups = [(edge, lr), (others, 10 * lr)]
        super().__init__(backbone, head, groups, weight_decay=weight_decay)
        self.radius = radius

    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of the affinities plus half that of the displacements."""
        grid = (labels.shape[1], labels.shape[2])
        pairs = pair_labels(labels, self.radius)
        affinity = edge_affinity(self.head.edge(features, grid).sigmoid(), self.radius)
        displacement = self.head.displacement(features, grid)
        apart = displacement_loss(displacement, pairs, self.radius)
        return affinity_loss(affinity, pairs) + apart / 2
