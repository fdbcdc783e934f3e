"""Fully connected conditional random field (dense CRF): neighbours of like colour agree on a class.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NeurIPS 2011. Mean field iterates ``Q <- softmax(-U + w_g K_g Q + w_b K_b Q)`` from ``softmax(-U)``,
where U is minus the logarithm of the probabilities, K_g a Gaussian of the distance of two pixels,
K_b one of distance and colour, both with their self term and normalised to ``D^-1/2 K D^-1/2``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from lpcam.data.dataset import Picture
from lpcam.errors import InputError
from lpcam.refiners.base import Device, Refiner
from lpcam.seeds.record import SeedRecord
from lpcam.settings import CHECKED, make

Backend = Literal["pydensecrf", "exact"]
# Of Caffe's networks, in steps of 8-bit colour.
MEAN_RGB = (122.675, 116.669, 104.008)
# What a probability of 0 counts as, in every published pipeline.
SMALLEST = 1e-5
# Pairs of pixels that the exact backend has in memory at a time.
BLOCK = 2**24
Deviation = Annotated[float, Field(ge=0.01, le=10_000)]
Weight = Annotated[float, Field(ge=0, le=10_000)]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
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

    iterations: Annotated[int, Field(ge=0, le=1000)]
    gaussian_sxy: Deviation
    gaussian_weight: Weight
    bilateral_sxy: Deviation
    bilateral_srgb: Deviation
    bilateral_weight: Weight


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


def crf_parameters(choice: str | Mapping[str, Any], setting: str) -> CRFParameters:
    """Look up published parameters by name, or take one's own.

    Args:
        choice: A name in :data:`PARAMETERS`, or the attributes of :class:`CRFParameters`.
        setting: What the user calls them.

    Raises:
        InputError: There is no such name, or attributes are missing, unknown or out of range.
    """
    if not isinstance(choice, str):
        return make(CRFParameters, choice, f"{setting}.{{}}".format)
    if choice not in PARAMETERS:
        raise InputError(f"{setting}={choice!r}: choose from {', '.join(PARAMETERS)}")
    return PARAMETERS[choice]


def with_background(maps: Tensor, value: float, *, power: bool = False) -> Tensor:
    """Put a background score before the maps.

    Args:
        maps: Maps ``(L, H, W)`` in 0..1; L may be 0.
        value: The background's score everywhere, or with ``power`` the exponent in
            ``(1 - strongest map)^value``, as in AffinityNet and EDAM.
        power: See above.

    Returns:
        ``(L + 1, H, W)``.
    """
    background = maps.new_full((1, *maps.shape[1:]), 0.0 if power else value)
    if power:
        strongest = torch.cat([background, maps]).amax(0, keepdim=True)
        background = (1 - strongest.clamp_max(1)) ** value
    return torch.cat([background, maps])


def equal_power(score: float) -> float:
    """The power p of a background ``(1 - strongest map)^p`` that a map equals at this score."""
    inside = min(max(score, 0.01), 0.99)
    return math.log(inside) / math.log(1 - inside)


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
    backend: Backend = "pydensecrf",
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
        InputError: The backend's package is missing.
    """
    check_backend(backend)
    unary = -probabilities.clamp_min(SMALLEST).log()
    if len(unary) < 2:
        return torch.ones_like(unary)
    infer = _lattice_mean_field if backend == "pydensecrf" else _exact_mean_field
    return infer(image, unary, parameters)


def check_backend(
    backend: Backend,
    setting: str = "refiner.backend=pydensecrf",
    instead: str = "refiner.backend=exact (slow without a GPU)",
) -> None:
    """Make sure of a backend's package.

    Args:
        backend: The backend.
        setting: The setting that chose it.
        instead: What the user may choose in its place.

    Raises:
        InputError: The package is missing.
    """
    if backend == "exact":
        return
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{setting}: its package is missing; pip install 'lpcam[crf]' (builds with a C "
            f"compiler), or take {instead}"
        ) from error


def wrapped_pixels(image: np.ndarray) -> np.ndarray:
    """A picture as the CRF of deeplab-pytorch and CLIP-ES sees it; their scores include this.

    They hand over what their network reads, colours minus their mean, as 8-bit numbers: what is
    below the mean wraps round to bright. (Their order of channels, BGR, means nothing to a CRF.)

    Args:
        image: The picture ``(H, W, 3)`` uint8, RGB.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    return (image - np.array(MEAN_RGB)).astype(np.int64).astype(np.uint8)


def scores_against_background(probabilities: Tensor) -> Tensor:
    """Turn probabilities into scores of the classes that exceed 0.5 where a class wins.

    The score of class c is ``q_c / (q_0 + max_k q_k)``, 0 being the background: for the strongest
    class ``q_c / (q_c + q_0)``. Were it that for every class, two sure ones would both round to 1.

    Args:
        probabilities: ``(L + 1, H, W)``, background first; L is at least 1.

    Returns:
        Scores ``(L, H, W)`` in 0..1.
    """
    classes = probabilities[1:]
    return classes / (probabilities[0] + classes.amax(0))


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


class CRF(Refiner):
    """Dense CRF on the maps and a background, at the picture's own size.

    The result is above 0.5 exactly where the CRF chooses a class.

    Args:
        parameters: See :func:`crf_parameters`.
        unary: How the maps become probabilities, with a background score b = ``unary_background``:
            ``constant``, next to a background of b; ``power``, next to one of
            ``(1 - strongest map)^b``; ``labels``, the labels of ``constant`` trusted to 0.7.
        unary_background: See above; None for ``seed_background``, or the power that is equal there.
        image_mode: What the CRF sees: ``raw``, the picture, or ``legacy_wrap``, see
            :func:`wrapped_pixels`.
        backend: See :func:`dense_crf`.
        device: Where the backend ``exact`` computes, such as "cuda".
        **options: See :class:`~lpcam.refiners.base.Refiner`.

    Raises:
        InputError: There are no such parameters, or the background's score is above 1.
    """

    @pydantic.validate_call(config=CHECKED)
    def __init__(
        self,
        *,
        parameters: str | Mapping[str, Any] = "psa",
        unary: Literal["constant", "power", "labels"] = "constant",
        unary_background: Annotated[float, Field(gt=0, le=1000)] | None = None,
        image_mode: Literal["raw", "legacy_wrap"] = "raw",
        backend: Backend = "pydensecrf",
        device: Device = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if unary_background is None:
            power = unary == "power"
            unary_background = equal_power(self.seed_background) if power else self.seed_background
        if unary != "power" and unary_background > 1:
            raise InputError(
                f"refiner.unary_background={unary_background}: a score in 0..1, an exponent only "
                "with refiner.unary=power"
            )
        self.parameters = crf_parameters(parameters, "refiner.parameters")
        self.unary = unary
        self.unary_background = unary_background
        self.image_mode = image_mode
        self.backend = backend
        self.device = device

    @property
    def mask_background(self) -> float:
        """The CRF's own decision."""
        return 0.5

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:  # noqa: D102 - inherited
        check_backend(self.backend)
        inputs = {**super().inputs(pictures), "parameters": asdict(self.parameters)}
        del inputs["device"]
        return inputs

    def refine(self, image_id: str, image: Image.Image, seed: SeedRecord) -> SeedRecord:  # noqa: D102 - inherited
        maps = seed.full_size().to(self.device)
        if len(maps):
            scored = with_background(maps, self.unary_background, power=self.unary == "power")
            if self.unary == "labels":
                scored = label_probabilities(scored.argmax(0), len(scored))
            pixels = np.array(image)
            if self.image_mode == "legacy_wrap":
                pixels = wrapped_pixels(pixels)
            found = dense_crf(pixels, scored, self.parameters, backend=self.backend)
            maps = scores_against_background(found)
        return SeedRecord(seed.keys, maps.half().cpu().numpy(), seed.size)
