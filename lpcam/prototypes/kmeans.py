"""k-means with cosine assignment, as LPCAM uses it.

Rows go to the centre of the largest cosine and a centre is the plain mean of its rows. That is
norm-weighted spherical k-means: it never decreases ``sum_i |x_i| cos(x_i, centre of i)``. The row's
own norm cannot change which centre is nearest, so an iteration is two matrix products, with no
(N, k, D) temporary.
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
    converged = False
    n_iter = 0
    while n_iter < max_iter and not converged:
        n_iter += 1
        new, labels, cosine = _step(x, norm, centers, chunk_size)
        empty = (torch.bincount(labels[nonzero], minlength=k) == 0).nonzero()[:, 0]
        if len(empty):
            worst = torch.where(nonzero, cosine, torch.inf).topk(len(empty), largest=False).indices
            new[empty] = x[worst].float()
        movement = torch.linalg.vector_norm(new - centers, dim=1).sum()
        converged = bool(movement**2 < tol)
        centers = new
    return KMeansResult(centers, labels, n_iter, converged)


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


def _step(
    x: Tensor, norm: Tensor, centers: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign and average in one read of the data: new centres, labels, cosine to the old centre."""
    unit = F.normalize(centers, dim=1).T
    clusters = torch.arange(len(centers), device=x.device)
    total, count = torch.zeros_like(centers), torch.zeros_like(centers[:, 0])
    labels, cosine = norm.new_empty(len(x), dtype=torch.int64), torch.empty_like(norm)
    for part, rows in single_precision(x, chunk_size):
        best = (rows @ unit).max(1)
        labels[part] = torch.where(norm[part] > 0, best.indices, -1)
        cosine[part] = best.values / norm[part].clamp_min(1e-12)
        member = (labels[part, None] == clusters).float()
        total += member.T @ rows
        count += member.sum(0)
    return total / count.clamp_min(1)[:, None], labels, cosine


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
