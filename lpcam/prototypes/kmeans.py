"""k-means with cosine assignment, as LPCAM uses it.

Rows go to the centre of the largest cosine and a centre is the plain mean of its rows. That is
norm-weighted spherical k-means: it never decreases ``sum_i |x_i| cos(x_i, centre of i)``.

A row is read again only if its nearest centre may be another now: bounds on its angles to all
centres, kept up by how far each centre has turned, tell (Elkan, "Using the triangle inequality to
accelerate k-means", ICML 2003; angles between directions are distances too).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import InputError

# Rows multiplied at a time. As single precision so many still fit into a processor's cache.
CHUNK = 1024
# Numbers up to which rows are converted once and not in each iteration: 512 MB.
ONCE = 2**27
# Rows that torch.multinomial draws one of.
DRAWN = 2**24
# Radians by which bounds have to differ: more than what single precision makes of an angle.
MARGIN = 1e-3


@dataclass(frozen=True)
class KMeansResult:
    """What :func:`spherical_kmeans` found.

    Attributes:
        centers: Plain means of the rows of each cluster ``(k, D)``, not normalised: selection by
            the classifier's score depends on their length.
        labels: Cluster of each row ``(N,)``; -1 for a zero row.
        n_iter: Iterations run.
        converged: Whether the centres came to rest before the iterations ran out.
    """

    centers: Tensor
    labels: Tensor
    n_iter: int
    converged: bool


def spherical_kmeans(
    x: Tensor,
    k: int,
    *,
    init: Tensor | None = None,
    seed: int = 0,
    max_iter: int = 100,
    tol: float = 1e-4,
    chunk_size: int = CHUNK,
) -> KMeansResult:
    """Cluster rows by direction.

    Zero rows have no direction and are ignored. An empty cluster restarts at the row that fits its
    own centre worst.

    Args:
        x: Rows ``(N, D)``; half precision is converted at once, or where that would take too much
            memory chunk by chunk.
        k: Number of clusters.
        init: Initial centres ``(k, D)``; k-means++ when absent.
        seed: Seed of k-means++.
        max_iter: Upper bound on iterations.
        tol: Stop when the square of the summed movement of all centres falls below it. This is the
            rule of the published LPCAM code (which uses 5, without a bound on iterations).
        chunk_size: Rows converted and multiplied at a time.

    Returns:
        Centres and labels; the labels are those that the centres are the means of.

    Raises:
        InputError: There are fewer non-zero rows than clusters, or not one iteration.
    """
    if max_iter < 1:
        raise InputError(f"prototypes.max_iter={max_iter}: give a number above 0")
    if x.numel() <= ONCE:
        x = x.float()
    norm = x.new_empty(len(x), dtype=torch.float32)
    for part, rows in single_precision(x, chunk_size):
        norm[part] = torch.linalg.vector_norm(rows, dim=1)
    nonzero = norm > 0
    available = int(nonzero.sum())
    if not 1 <= k <= available:
        raise InputError(
            f"k={k} clusters need at least as many features, and there are {available}; lower k"
        )
    centers = _plus_plus(x, norm, k, seed, chunk_size) if init is None else init.float()
    clusters = _Clusters(x, norm, k, chunk_size)
    converged = False
    n_iter = 0
    while n_iter < max_iter and not converged:
        n_iter += 1
        new = clusters.assign(centers)
        empty = (clusters.counts == 0).nonzero()[:, 0]
        if len(empty):
            cosine = cosine_to_center(x, centers, clusters.labels)
            worst = torch.where(nonzero, cosine, torch.inf).topk(len(empty), largest=False).indices
            new[empty] = x[worst].float()
        movement = torch.linalg.vector_norm(new - centers, dim=1).sum()
        converged = bool(movement**2 < tol)
        clusters.move(centers, new)
        centers = new
    if not len(empty):
        centers = clusters.means()
    return KMeansResult(centers, clusters.labels, n_iter, converged)


def single_precision(x: Tensor, chunk_size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """Go through rows in single precision, a chunk at a time.

    All chunks are converted into one buffer. A new tensor for each would cost more than the
    products with it, and between other allocations leave the heap full of holes.

    Args:
        x: Rows ``(N, D)``.
        chunk_size: Rows at a time.

    Yields:
        Which rows, and their values ``(n, D)``, valid until the next chunk.
    """
    buffer = None if x.dtype == torch.float32 else x[:chunk_size].float()
    for start in range(0, len(x), chunk_size):
        part = slice(start, min(start + chunk_size, len(x)))
        rows = x[part]
        yield part, rows if buffer is None else buffer[: len(rows)].copy_(rows)


class _Clusters:
    """Which rows belong to which centre, their sums, and bounds that tell when that may change.

    Args:
        x: Rows ``(N, D)``.
        norm: Their lengths ``(N,)``.
        k: Number of clusters.
        chunk_size: Rows read at a time.
    """

    def __init__(self, x: Tensor, norm: Tensor, k: int, chunk_size: int) -> None:
        self.x, self.norm, self.chunk_size = x, norm, chunk_size
        self.labels = torch.full_like(norm, -1, dtype=torch.int64)
        self.sums = norm.new_zeros(k, x.shape[1])
        # The angle to the own centre is at most this, to the others at least that: nothing yet.
        self.own = torch.where(norm > 0, 0, -torch.inf)
        self.others = norm.new_zeros(len(x), k)

    @property
    def counts(self) -> Tensor:
        """Rows of each cluster ``(k,)``."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=len(self.sums))

    def assign(self, centers: Tensor) -> Tensor:
        """Move rows to their nearest centres; the means of the rows ``(k, D)`` then."""
        unit = F.normalize(centers, dim=1).T
        clusters = torch.arange(len(centers), device=centers.device)
        unsure = (self.own + MARGIN > self.others.amin(1)).nonzero()[:, 0]
        for index in unsure.split(self.chunk_size) if len(unsure) else ():
            whole = index[-1] - index[0] + 1 == len(index)
            rows = self.x[index[0] : index[-1] + 1] if whole else self.x.index_select(0, index)
            rows = rows.float()
            angles = ((rows @ unit) / self.norm[index, None]).clamp_(-1, 1).acos_()
            self.own[index], now = angles.min(1)
            self.others[index] = angles.scatter_(1, now[:, None], torch.inf)
            before = self.labels[index]
            left = (now != before).nonzero()[:, 0]
            joined = (now[left, None] == clusters).float()
            self.sums += (joined - (before[left, None] == clusters).float()).T @ rows[left]
            self.labels[index] = now
        return self.sums / self.counts.clamp_min(1)[:, None]

    def means(self) -> Tensor:
        """The means ``(k, D)`` anew: sums that rows have joined and left have lost a few digits."""
        clusters = torch.arange(len(self.sums), device=self.sums.device)
        sums = torch.zeros_like(self.sums)
        for part, rows in single_precision(self.x, self.chunk_size):
            sums += (self.labels[part, None] == clusters).float().T @ rows
        return sums / self.counts.clamp_min(1)[:, None]

    def move(self, old: Tensor, new: Tensor) -> None:
        """Let centres ``(k, D)`` go to where they are new, which widens the bounds."""
        turn = F.normalize(new, dim=1) - F.normalize(old, dim=1)
        angle = 2 * (torch.linalg.vector_norm(turn, dim=1) / 2).clamp_max(1).asin()
        self.own += torch.where(self.labels >= 0, angle[self.labels], 0)
        self.others -= angle


def cosine_to_center(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Cosine ``(N,)`` of each row ``(N, D)`` to the centre of its cluster, one of ``(k, D)``."""
    unit = F.normalize(centers, dim=1).T
    cosine = centers.new_empty(len(x))
    for part, rows in single_precision(x):
        product = (rows @ unit).gather(1, labels[part, None].clamp_min(0))[:, 0]
        cosine[part] = product / torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)
    return cosine


def _plus_plus(x: Tensor, norm: Tensor, k: int, seed: int, chunk_size: int) -> Tensor:
    """k-means++ for this objective: rows are drawn with probability ``|x| (1 - best cosine)``."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    distance, cosine = torch.ones_like(norm), torch.empty_like(norm)
    for _ in range(k):
        mass = (norm * distance).double().cpu()
        mass[chosen] = 0
        if not mass.any():  # fewer directions than clusters: any row that is still free
            mass = (norm > 0).double().cpu()
            mass[chosen] = 0
        chosen.append(_draw(mass, generator))
        unit = F.normalize(x[chosen[-1]].float(), dim=0)
        for part, rows in single_precision(x, chunk_size):
            torch.mv(rows, unit, out=cosine[part])
        cosine /= norm.clamp_min(1e-12)
        # Rounding may put a copy of the chosen row at a distance of 1e-7, never to be drawn.
        distance = torch.minimum(distance, torch.where(cosine > 1 - 1e-6, 0, 1 - cosine))
    return x[chosen].float()


def _draw(mass: Tensor, generator: torch.Generator) -> int:
    """Index of one of N rows, drawn with a probability in proportion to its mass ``(N,)``."""
    if len(mass) <= DRAWN:
        return int(torch.multinomial(mass, 1, generator=generator))
    blocks = mass.split(DRAWN)
    block = _draw(torch.stack([rows.sum() for rows in blocks]), generator)
    return block * DRAWN + _draw(blocks[block], generator)
