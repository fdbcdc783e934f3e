# python experiments/prototype_choices.py experiments=voc_animals dataset.root=~/VOC2012
"""Other ways to choose, weigh and cluster prototypes, each against the paper's, on train.

Takes the overrides of ``infer.py``, after its training. Maps are of one view, without the
step between positions; every fourth picture of train is scored. Nothing here uses a mask but the
score. Prints points of mIoU; a second number is the difference to the paper's way.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lpcam.data.dataset import Picture, multi_hot
from lpcam.data.loaders import normalized, view_loader
from lpcam.errors import InputError
from lpcam.evaluation import SegmentationScore
from lpcam.functional import class_activation_map, normalize_maps
from lpcam.programs.compose import infer_config
from lpcam.programs.run import Run
from lpcam.prototypes.kmeans import spherical_kmeans
from lpcam.prototypes.selection import class_score
from lpcam.stages.features import read_features

Cluster = Callable[[Tensor, int], Tensor]


class Study:
    """The features, centres and labels that every variant shares.

    Args:
        overrides: Those of ``infer.py``.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.run = Run(infer_config(overrides, "outputs/choices"), [])
        if self.run.clustering.signed != "keep":
            raise InputError("prototypes.signed: features are compared as they are here; set keep")
        self.pictures = self.run.dataset.pictures(self.run.dataset.prototype_split)
        self.shown = multi_hot(self.pictures, len(self.run.dataset.classes))
        self.features = [self.read(picture) for picture in self.pictures]
        raw, settings = self.run.centers.centers, self.run.selection
        self.raw, self.sides = raw, F.normalize(raw, dim=3)
        scores = [[class_score(self.run.host, side, c) for side in raw[c]] for c in range(len(raw))]
        self.scores = torch.stack([torch.stack(pair) for pair in scores])
        own = self.scores[:, 0] > settings.class_score
        own[torch.arange(len(own)), self.scores[:, 0].argmax(1)] = True
        self.kept = torch.stack([own, self.scores[:, 1] < settings.context_score], 1)
        # Largest and mean cosine of each picture to each centre (N, C, 2, K).
        rows = self.sides.flatten(0, 2)
        found = [F.normalize(x.float().flatten(0, 1), dim=1) @ rows.T for x in self.features]
        shape = (len(found), *raw.shape[:3])
        self.largest = torch.stack([cosine.amax(0) for cosine in found]).view(shape)
        self.mean = torch.stack([cosine.mean(0) for cosine in found]).view(shape)

    def read(self, picture: Picture) -> Tensor:
        """Local features of a picture ``(h, w, D)`` float16."""
        return torch.from_numpy(read_features(self.run.features, picture, "local"))

    def directions(self, own: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Directions ``(C, D)`` from weights of the centres ``(C, K)``; None for the paper's."""
        weights = (own, context)
        total = torch.zeros(len(self.raw), self.raw.shape[3])
        for side, given in enumerate(weights):
            weight = (self.kept[:, side] if given is None else given).float()
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-9)
            total += (1 - 2 * side) * (weight[..., None] * self.sides[:, side]).sum(1)
        return total

    def auc(self, side: int) -> Tensor:
        """How well each centre of a side tells pictures of its class from others ``(C, K)``."""
        return torch.tensor(
            [
                [roc_auc_score(self.shown[:, c], column) for column in self.largest[:, c, side].T]
                for c in range(len(self.raw))
            ]
        )

    def nearness(self, own: Tensor) -> Tensor:
        """Cosine of each context centre to the nearest prototype of another class ``(C, K)``."""
        rows = []
        for c, context in enumerate(self.sides[:, 1]):
            others = [self.sides[d, 0][own[d]] for d in range(len(own)) if d != c]
            rows.append((context @ torch.cat(others).T).amax(1))
        return torch.stack(rows)

    def learnt(self, pooled: Tensor, strength: float) -> Tensor:
        """Directions of logistic regressions on the pooled cosines, signs as they come."""
        total = torch.zeros(len(self.raw), self.raw.shape[3])
        for c, centers in enumerate(self.sides):
            x = pooled[:, c].flatten(1).numpy()
            model = LogisticRegression(C=strength, max_iter=2000)
            model.fit(x - x.mean(0), self.shown[:, c])
            total[c] = torch.from_numpy(model.coef_[0]).float() @ centers.flatten(0, 1)
        return total

    @torch.no_grad()
    def scaled(self, index: int) -> list[Tensor]:
        """Local features of a picture at each of the scales that maps are made of ``(h, w, D)``."""
        count, host = len(self.raw), self.run.host
        scales = self.run.inference.scales
        (batch,) = view_loader([self.pictures[index]], count, scales=scales, flip=False)
        views = host.predict_step(normalized(batch, host.backbone.mean, host.backbone.std), 0)
        return [view.features[0, 0].permute(1, 2, 0) for view in views]

    def retrained(self, directions: Tensor) -> Tensor:
        """Weights ``(C, D)`` of a head on the means of features by the maps of directions."""
        pooled = []
        for features in self.features:
            x = features.float().permute(2, 0, 1)[None]
            maps = normalize_maps(class_activation_map(F.normalize(x, dim=1), directions))[0]
            total = maps.sum((1, 2)).clamp_min(1e-9)[:, None]
            pooled.append(maps.flatten(1) @ x[0].flatten(1).T / total)
        rows = torch.stack(pooled, 1).numpy()
        fits = [
            LogisticRegression(max_iter=2000).fit(x, shown)
            for x, shown in zip(rows, self.shown.T, strict=True)
        ]
        return torch.from_numpy(np.concatenate([fit.coef_ for fit in fits])).float()

    def alternated(self, directions: Tensor, taus: Sequence[float]) -> Tensor:
        """Directions after rounds of a split by the last ones, at these taus, and clustering."""
        for tau in taus:
            directions = self.clustered(cosine_means, directions, tau)
        return directions

    def clustered(
        self, cluster: Cluster, split: Tensor | None = None, tau: float = 0, scales: bool = False
    ) -> Tensor:
        """Directions from other clusters, or from a split by other maps ``(C, D)`` than CAM.

        Args:
            cluster: Gives centres of rows.
            split: Directions of the maps; None for CAM.
            tau: Where these split features; 0 for the setting's.
            scales: Take every eighth feature of all scales instead of those of scale 1.
        """
        settings, host, limits = self.run.clustering, self.run.host, self.run.selection
        total = torch.zeros(len(self.raw), self.raw.shape[3])
        for c in range(len(total)):
            sides: tuple[list[Tensor], list[Tensor]] = ([], [])
            for index in np.flatnonzero(self.shown[:, c]):
                for x in self.scaled(index) if scales else [self.features[index].float()]:
                    grid = x.permute(2, 0, 1)[None]
                    if split is None:
                        maps = host.own_maps(grid, torch.tensor([c]))
                    else:
                        maps = class_activation_map(F.normalize(grid, dim=1), split[c : c + 1])
                    inside = normalize_maps(maps)[0, 0] >= (tau or settings.activation)
                    step = 8 if scales else 1
                    sides[0].append(x[inside][::step])
                    sides[1].append(x[~inside][::step])
            own, context = (cluster(torch.cat(side), settings.k) for side in sides)
            score = class_score(host, own, c)
            keep = score > limits.class_score
            keep[score.argmax()] = True
            rest = context[class_score(host, context, c) < limits.context_score]
            total[c] = F.normalize(own[keep], dim=1).mean(0)
            if len(rest):
                total[c] -= F.normalize(rest, dim=1).mean(0)
        return total

    def score(self, variants: dict[str, Tensor]) -> dict[str, float]:
        """The best mIoU of each variant's maps on every fourth picture, in percent."""
        dataset = self.run.dataset
        totals = {name: SegmentationScore(len(dataset.classes)) for name in variants}
        for picture, features in list(zip(self.pictures, self.features, strict=True))[::4]:
            mask, labels = dataset.mask(picture), list(picture.labels or ())
            unit = F.normalize(features.float().permute(2, 0, 1)[None], dim=1)
            for name, directions in variants.items():
                maps = normalize_maps(class_activation_map(unit, directions[labels]))
                full = F.interpolate(maps, mask.shape, mode="bilinear", align_corners=False)[0]
                totals[name].update(full, labels, mask)
        return {name: 100 * float(t.compute().miou.max()) for name, t in totals.items()}


def sample(rows: Tensor, count: int) -> Tensor:
    """So many rows at random, none of them zero."""
    rows = rows[rows.any(1)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]


def by_labels(make: Callable[[int], Any], count: int, prepare: Callable[[Tensor], Any]) -> Cluster:
    """Clusters of one of scikit-learn's, on a sample of rows."""

    def cluster(rows: Tensor, k: int) -> Tensor:
        rows = sample(rows, count)
        labels = torch.from_numpy(make(k).fit_predict(prepare(rows)))
        return torch.stack([rows[labels == j].mean(0) for j in labels.unique()])

    return cluster


def cosine_means(rows: Tensor, k: int) -> Tensor:
    """The paper's clusters."""
    return spherical_kmeans(rows, k).centers


def units(rows: Tensor) -> np.ndarray:
    """Rows of length 1."""
    return F.normalize(rows, dim=1).numpy()


def main() -> None:
    """Print the table."""
    study = Study(sys.argv[1:])
    own, context = study.kept.unbind(1)
    auc, context_auc = study.auc(0), study.auc(1)
    others = study.nearness(own)
    score, context_score = study.scores.unbind(1)
    sizes = study.run.centers.counts.float()
    paper = study.directions()
    apart = {limit: context & (others < limit) for limit in (0.7, 0.8)}
    means = by_labels(lambda k: KMeans(k, n_init=1, random_state=0), 8000, Tensor.numpy)
    unit_means = by_labels(lambda k: KMeans(k, n_init=1, random_state=0), 8000, units)
    linked = by_labels(
        lambda k: AgglomerativeClustering(k, metric="cosine", linkage="average"), 2500, Tensor.numpy
    )
    mixture = by_labels(
        lambda k: GaussianMixture(k, covariance_type="diag", random_state=0),
        8000,
        lambda rows: PCA(64, random_state=0).fit_transform(units(rows)),
    )
    variants = {
        "the paper's": paper,
        "class: weighed by 2 AUC - 1": study.directions(own=own * (2 * auc - 1).clamp_min(0)),
        "class: AUC above 0.7": study.directions(own=own & (auc > 0.7)),
        "context: AUC below 0.7": study.directions(context=context & (context_auc < 0.7)),
        "context: not within 0.7 of others' class": study.directions(context=apart[0.7]),
        "context: not within 0.8 of others' class": study.directions(context=apart[0.8]),
        "all, by score and 1 - score": study.directions(score, 1 - context_score),
        "by cluster size": study.directions(own * sizes[:, 0], context * sizes[:, 1]),
        "learnt, largest cosine": study.learnt(study.largest, 10),
        "learnt, mean cosine": study.learnt(study.mean, 10),
        "cosine k-means, 8,000 rows": study.clustered(
            lambda rows, k: spherical_kmeans(sample(rows, 8000), k).centers
        ),
        "euclidean k-means": study.clustered(means),
        "euclidean k-means, unit rows": study.clustered(unit_means),
        "Ward, unit rows": study.clustered(by_labels(AgglomerativeClustering, 2500, units)),
        "average linkage, cosine": study.clustered(linked),
        "Gaussian mixture, 64 components": study.clustered(mixture),
    }
    for taus in ((0.1,), (0.2,), (0.3,), (0.3, 0.2, 0.1), (0.1, 0.2, 0.3)):
        name = f"split anew by LPCAM, tau {', '.join(map(str, taus))}"
        variants[name] = study.alternated(paper, taus)
    head = study.retrained(paper)
    variants["head on features pooled by LPCAM"] = head
    variants["split by that head"] = study.clustered(cosine_means, head)
    variants["features of all scales"] = study.clustered(cosine_means, scales=True)
    found = study.score(variants)
    base = next(iter(found.values()))
    for name, value in found.items():
        print(f"| {name} | {value:.1f} | {value - base:+.1f} |")


if __name__ == "__main__":
    main()
