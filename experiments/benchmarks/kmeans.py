"""k-means of local features: LPCAM's beside the published way, scikit-learn and faiss.

All begin with the same rows and run the same number of iterations, without a rule to stop. What is
compared beyond time is ``sum |x| cos(x, nearest centre)``, which all but scikit-learn maximise:
faiss with unit rows weighted by their lengths, scikit-learn likewise by squared distances.
"Broadcasting" multiplies every row with every centre number by number, as kmeans_pytorch does that
the published code calls, in blocks of rows, for all at once would not fit into memory.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor

from experiments.benchmarks.harness import (
    Method,
    Options,
    Row,
    in_child,
    ratio,
    rounds,
    section,
    target,
    timed_rows,
)
from lpcam.prototypes.kmeans import single_precision, spherical_kmeans

K, ITERATIONS, SLOW_ITERATIONS = 12, 20, 1
# Local features of a VOC class of middle size, and of "person".
SMALL, LARGE = 47_038, 340_224
BLOCK = 2048
OURS, FAISS, SKLEARN = "LPCAM", "faiss, spherical and weighted", "scikit-learn, unit rows"
BROADCAST = "broadcasting"
Reached = Callable[[], Row]


def features(count: int, dim: int) -> Tensor:
    """Rows ``(count, dim)`` in half precision, not negative, on a surface of 16 dimensions.

    Clusters that lie apart would be found in two or three iterations, which those of a network are
    not.
    """
    generator = torch.Generator().manual_seed(0)
    surface = torch.randn(16, dim, generator=generator)
    rows = torch.empty(count, dim, dtype=torch.float16)
    for part in rows.split(BLOCK):
        places = torch.randn(len(part), 16, generator=generator)
        noise = torch.randn(len(part), dim, generator=generator)
        part.copy_((places @ surface + noise - 2).relu() / 4)
    return rows


def clusterings(options: Options, count: int, half: bool = False) -> dict[str, Method]:
    """Ways to cluster the same rows; each gives a function that says what it reached."""
    rows = features(count // 100 if options.quick else count, 256 if options.quick else 2048)
    rows = (rows if half else rows.float()).to(options.device)
    generator = torch.Generator().manual_seed(1)
    start = rows[torch.randperm(len(rows), generator=generator)[:K]].float()

    def ours() -> Reached:
        found = spherical_kmeans(rows, K, init=start, max_iter=ITERATIONS, tol=0)
        return functools.partial(reached, rows, found.centers, found.n_iter)

    def broadcasting() -> Reached:
        centers = start
        for _ in range(SLOW_ITERATIONS):
            labels = torch.cat(
                [
                    F.cosine_similarity(block.float()[:, None], centers[None], dim=2).argmax(1)
                    for block in rows.split(BLOCK)
                ]
            )
            centers = torch.stack([rows[labels == k].float().mean(0) for k in range(K)])
        return functools.partial(reached, rows, centers, SLOW_ITERATIONS)

    methods: dict[str, Method] = {OURS: ours, BROADCAST: broadcasting}
    if options.device == "cpu":
        methods |= _of_others(rows, start, options.threads)
    return methods


def _of_others(rows: Tensor, start: Tensor, threads: int) -> dict[str, Method]:
    from sklearn.cluster import KMeans

    first = F.normalize(start, dim=1).numpy()

    def sklearn() -> Reached:
        lengths = torch.linalg.vector_norm(rows.float(), dim=1)
        unit = F.normalize(rows.float(), dim=1).numpy()
        method = KMeans(K, init=first, n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
        with threadpool_limits(threads):
            method.fit(unit, sample_weight=lengths.numpy())
        return functools.partial(
            reached, rows, torch.from_numpy(method.cluster_centers_), int(method.n_iter_)
        )

    methods: dict[str, Method] = {SKLEARN: sklearn}
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)

        def with_faiss() -> Reached:
            lengths = torch.linalg.vector_norm(rows.float(), dim=1)
            unit = F.normalize(rows.float(), dim=1).numpy()
            method = faiss.Kmeans(
                rows.shape[1], K, niter=ITERATIONS, spherical=True,
                min_points_per_centroid=1, max_points_per_centroid=len(rows),
            )  # fmt: skip
            method.train(unit, weights=lengths.numpy(), init_centroids=first)
            return functools.partial(reached, rows, torch.from_numpy(method.centroids), ITERATIONS)

        methods[FAISS] = with_faiss
    return methods


def reached(rows: Tensor, centers: Tensor, iterations: int) -> Row:
    """Iterations, and the objective with every row at its nearest centre."""
    unit = F.normalize(centers.to(rows.device).float(), dim=1).T
    total = sum(float((part @ unit).amax(1).double().sum()) for _, part in single_precision(rows))
    return {"iterations": iterations, "objective": total}


def table(options: Options) -> list[Row]:
    """A class of middle size in single precision, and the largest one in half precision."""
    return [_small(options), _large(options)]


def _small(options: Options) -> Row:
    methods = clusterings(options, SMALL)
    seconds = rounds(
        methods, 3 if options.quick else 5, warm_up=1, budget=20, settle=options.settle
    )
    rows = timed_rows(seconds)
    for row in rows:
        row |= in_child("kmeans:clusterings", options, row["name"], count=SMALL)
    # The control is a method that does the same whatever the data are.
    control = seconds[SKLEARN if SKLEARN in seconds else BROADCAST]
    return _section(f"k-means, {SMALL:,} x 2,048, single precision", rows, seconds, control)


def _large(options: Options) -> Row:
    rows, seconds = [], {}
    for name in clusterings(options, K * 100):
        if name == BROADCAST:  # an iteration takes as long for each row as on fewer
            continue
        found = in_child("kmeans:clusterings", options, name, count=LARGE, half=True)
        seconds[name] = [found["seconds"]]
        rows.append({"name": name, "median": found["seconds"], **found})
    title = f"k-means, {LARGE:,} x 2,048, kept in half precision, one run each"
    return _section(title, rows, seconds)


def _section(
    title: str,
    rows: list[Row],
    seconds: dict[str, list[float]],
    control: list[float] | None = None,
) -> Row:
    for row in rows:
        row.pop("seconds")
        row["iteration"] = row["median"] / row["iterations"]
    by_name = {row["name"]: row for row in rows}
    whole = [row["objective"] for row in rows if row["name"] != BROADCAST]
    ours = by_name[OURS]
    share = ours["objective"] / max(whole)
    targets = [target("objective of LPCAM / the best", share, least=0.995)]
    if FAISS in by_name:
        targets.append(target("LPCAM / faiss", ratio(seconds[OURS], seconds[FAISS]), most=1.0))
    if BROADCAST in by_name:
        slow = by_name[BROADCAST]["iteration"] / ours["iteration"]
        targets.append(target("an iteration of broadcasting / of LPCAM", slow, least=40))
    text = (
        f"Drawn features, K = {K}, {ITERATIONS} iterations from the same rows, of broadcasting "
        f"{SLOW_ITERATIONS}; scikit-learn stops where nothing changes. Seconds are those of the "
        "whole call, lengths and unit rows included."
    )
    return section(title, text, rows, targets=targets, control=control)
