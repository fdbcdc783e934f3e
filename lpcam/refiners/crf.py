"""Fully connected conditional random field (dense CRF): neighbours of like colour agree on a class.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NeurIPS 2011. Mean field iterates ``Q <- softmax(-U + w_g K_g Q + w_b K_b Q)`` from ``softmax(-U)``,
where U is minus the logarithm of the probabilities, K_g a Gaussian of the distance of two pixels,
K_b one of distance and colour, both with their self term and normalised to ``D^-1/2 K D^-1/2``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpcam.errors import InputError

BACKENDS = ("pydensecrf", "exact")
# What a probability of 0 counts as, in every published pipeline.
SMALLEST = 1e-5
# Pairs of pixels that the exact backend has in memory at a time.
BLOCK = 2**24


@dataclass(frozen=True)
class CRFParameters:
    """The two kernels and the number of iterations.

    Attributes:
        iterations: Mean-field updates.
        gaussian_sxy: Standard deviation of the smoothness kernel in pixels.
        gaussian_weight: Its weight.
        bilateral_sxy: Standard deviation of the appearance kernel in pixels.
        bilateral_srgb: And in steps of 8-bit colour.
        bilateral_weight: Its weight.
    """

    iterations: int
    gaussian_sxy: float
    gaussian_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float


# As published, by where they are used: the labels that IRN is trained with (IRN, ReCAM, AMN,
# LPCAM), the labels of AffinityNet and MCTformer, EDAM's maps, and three segmentation networks'
# output (DeepLabV2's is also CLIP-ES's).
PARAMETERS = {
    "irn_labels": CRFParameters(10, 3, 3, 50, 5, 10),
    "psa": CRFParameters(10, 3, 3, 80, 13, 10),
    "edam": CRFParameters(3, 3, 3, 80, 13, 10),
    "deeplab": CRFParameters(10, 1, 3, 67, 3, 4),
    "mctformer_seg": CRFParameters(10, 4, 3, 83, 5, 3),
    "afa": CRFParameters(10, 3, 3, 64, 5, 4),
}


def label_probabilities(labels: Tensor, num_labels: int, gt_prob: float = 0.7) -> Tensor:
    """Probabilities of a label map: ``gt_prob`` for each pixel's label, the rest shared evenly.

    Args:
        labels: Labels ``(H, W)``, integers below ``num_labels``.
        num_labels: Number of labels L.
        gt_prob: How far a label is trusted, above ``1 / L``.

    Returns:
        Probabilities ``(L, H, W)`` float32.
    """
    rest = (1 - gt_prob) / max(num_labels - 1, 1)
    chosen = torch.arange(num_labels, device=labels.device)[:, None, None] == labels
    return torch.where(chosen, gt_prob, rest)


def dense_crf(
    image: np.ndarray,
    probabilities: Tensor,
    parameters: CRFParameters,
    *,
    backend: str = "pydensecrf",
) -> Tensor:
    """Refine the class probabilities of one picture.

    ``pydensecrf`` approximates both kernels with a permutohedral lattice and takes a fraction of a
    second on one CPU core. ``exact`` evaluates every pair of pixels, in blocks: for small pictures,
    or on a GPU. They agree on sure pixels; on noise the lattice's argmax differs here and there, so
    published figures are reproduced with ``pydensecrf``.

    Args:
        image: The picture ``(H, W, 3)`` uint8, RGB.
        probabilities: Scores ``(L, H, W)`` of the L labels, background included, not negative; a
            pixel's need not add up to 1. ``exact`` computes on their device and in their precision.
        parameters: See :data:`PARAMETERS`.
        backend: ``pydensecrf`` or ``exact``.

    Returns:
        Probabilities ``(L, H, W)``; each pixel's add up to 1.

    Raises:
        InputError: The backend is unknown or its package is missing.
    """
    check_backend(backend)
    unary = -probabilities.clamp_min(SMALLEST).log()
    if len(unary) < 2:
        return torch.ones_like(unary)
    infer = _lattice_mean_field if backend == "pydensecrf" else _exact_mean_field
    return infer(image, unary, parameters)


def check_backend(backend: str) -> None:
    """Raise an InputError unless this backend can be used."""
    if backend not in BACKENDS:
        raise InputError(f"refiner.backend={backend}: unknown; choose {' or '.join(BACKENDS)}")
    if backend == "pydensecrf":
        try:
            import pydensecrf.densecrf  # noqa: F401
        except ImportError as error:
            raise InputError(
                "refiner.backend=pydensecrf: its package is missing; pip install 'lpcam[crf]' "
                "(builds with a C compiler), or take refiner.backend=exact (slow without a GPU)"
            ) from error


def _lattice_mean_field(image: np.ndarray, unary: Tensor, parameters: CRFParameters) -> Tensor:
    from pydensecrf.densecrf import DenseCRF2D

    count, height, width = unary.shape
    field = DenseCRF2D(width, height, count)
    field.setUnaryEnergy(np.ascontiguousarray(unary.float().cpu().numpy().reshape(count, -1)))
    field.addPairwiseGaussian(sxy=parameters.gaussian_sxy, compat=parameters.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=parameters.bilateral_sxy,
        srgb=parameters.bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=parameters.bilateral_weight,
    )
    result = np.array(field.inference(parameters.iterations), np.float32)
    return torch.from_numpy(result.reshape(count, height, width)).to(unary)


def _exact_mean_field(image: np.ndarray, unary: Tensor, parameters: CRFParameters) -> Tensor:
    _, height, width = unary.shape
    rows = torch.arange(height).to(unary)
    columns = torch.arange(width).to(unary)
    # The smoothness kernel is the product of one over rows and one over columns.
    over_rows, over_columns = (
        (-((line[:, None] - line) ** 2) / (2 * parameters.gaussian_sxy**2)).exp()
        for line in (rows, columns)
    )
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    colour = torch.from_numpy(image).to(unary)
    points = torch.cat(
        [place / parameters.bilateral_sxy, colour / parameters.bilateral_srgb], -1
    ).flatten(0, 1)

    def smooth(values: Tensor) -> Tensor:
        return over_rows @ values @ over_columns

    step = max(BLOCK // len(points), 1)

    def kernel(block: Tensor) -> Tensor:
        # From differences: dot products would cancel.
        distance = torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist")
        return (distance**2 / -2).exp_()

    whole = kernel(points) if len(points) <= step else None

    def similar(values: Tensor) -> Tensor:
        flat = values.flatten(1).T.contiguous()
        if whole is not None:
            return (whole @ flat).T.reshape(values.shape)
        rows = [kernel(block) @ flat for block in points.split(step)]
        return torch.cat(rows).T.reshape(values.shape)

    ones = torch.ones_like(unary[:1])
    smooth_scale, similar_scale = smooth(ones).rsqrt(), similar(ones).rsqrt()
    found = (-unary).softmax(0)
    for _ in range(parameters.iterations):
        near = smooth_scale * smooth(smooth_scale * found)
        alike = similar_scale * similar(similar_scale * found)
        message = parameters.gaussian_weight * near + parameters.bilateral_weight * alike
        found = (message - unary).softmax(0)
    return found
