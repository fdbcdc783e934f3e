"""Slow reference for MCTformer: a ViT token by token in NumPy, its maps and its losses."""

import math
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def _norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    unit = (x - mean) / math.sqrt(variance + 1e-6)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def transformer(
    weights: Weights, image: np.ndarray, patch: int, depth: int, heads: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens ``(C + N, D)`` after each block, and its attention ``(C + N, C + N)`` over heads.

    Args:
        weights: Weights by timm's names; as many class tokens as there are.
        image: A normalised picture ``(3, H, W)`` of the size that the position embeddings are for.
        patch: Side of a patch in pixels.
        depth: Number of blocks.
        heads: Number of heads.
    """
    tokens = list(weights["cls_token"][0])
    kernel = weights["patch_embed.proj.weight"]
    for row, column in np.ndindex(image.shape[1] // patch, image.shape[2] // patch):
        pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        tokens.append(
            np.array([(k * pixels).sum() for k in kernel]) + weights["patch_embed.proj.bias"]
        )
    x = np.stack(tokens) + weights["pos_embed"][0]
    layers, attentions = [], []
    for block in range(depth):
        name = f"blocks.{block}"
        normed = [_norm(token, weights, f"{name}.norm1") for token in x]
        qkv = np.stack([_linear(token, weights, f"{name}.attn.qkv") for token in normed])
        dim = x.shape[1]
        width = dim // heads
        mean = np.zeros((len(x), len(x)))
        mixed = np.zeros_like(x)
        for head in range(heads):
            q, k, v = (
                qkv[:, part * dim + head * width : part * dim + (head + 1) * width]
                for part in range(3)
            )
            rows = np.stack([_softmax(k @ query / math.sqrt(width)) for query in q])
            mean += rows / heads
            mixed[:, head * width : (head + 1) * width] = rows @ v
        x = x + np.stack([_linear(token, weights, f"{name}.attn.proj") for token in mixed])
        for place, token in enumerate(x.copy()):
            hidden = _linear(_norm(token, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
            hidden = np.array([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
            x[place] = token + _linear(hidden, weights, f"{name}.mlp.fc2")
        layers.append(x.copy())
        attentions.append(mean)
    return layers, attentions


def convolution(features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of features ``(D, h, w)`` with zeros around them: ``(C, h, w)``."""
    _, height, width = features.shape
    found = np.zeros((len(weight), height, width))
    for c, y, x in np.ndindex(found.shape):
        found[c, y, x] = bias[c]
        for dy in range(3):
            for dx in range(3):
                row, column = y + dy - 1, x + dx - 1
                if 0 <= row < height and 0 <= column < width:
                    found[c, y, x] += weight[c, :, dy, dx] @ features[:, row, column]
    return found


def maps(
    attentions: list[np.ndarray],
    patch_maps: np.ndarray,
    variant: str,
    last: int,
    *,
    refine: bool = True,
) -> np.ndarray:
    """The maps of one view from the attention of all layers and rectified maps ``(C, h, w)``.

    V1 does not read the latter, unless LPCAM gives them: pass ones.
    """
    classes, height, width = patch_maps.shape
    count = height * width
    found = np.zeros_like(patch_maps)
    for c in range(classes):
        fused = np.zeros(count)
        for j in range(count):
            seen = sum(layer[c, classes + j] for layer in attentions[-last:])
            if variant == "plus":
                seen /= last
            value = seen * patch_maps[c].flat[j]
            fused[j] = math.sqrt(value) if variant == "plus" else value
        refined = np.zeros(count)
        for i in range(count):
            for j in range(count):
                affinity = sum(layer[classes + i, classes + j] for layer in attentions)
                refined[i] += affinity * fused[j]
        if not refine:
            refined = fused
        found[c] = (refined - refined.min()).reshape(height, width)
    return found


def soft_margin(scores: np.ndarray, labels: np.ndarray) -> float:
    """Multi-label soft margin loss of one picture."""
    total = 0.0
    for score, label in zip(scores, labels, strict=True):
        p = 1 / (1 + math.exp(-score))
        total -= label * math.log(p) + (1 - label) * math.log(1 - p)
    return total / len(scores)


def rank_weighted(values: np.ndarray, decay: float) -> float:
    """Mean of values, the r-th largest of weight ``decay ** r``."""
    ordered = sorted(values, reverse=True)
    weights = [decay**rank for rank in range(len(ordered))]
    return sum(w * v for w, v in zip(weights, ordered, strict=True)) / sum(weights)


def contrast(tokens: np.ndarray, labels: np.ndarray) -> float:
    """Contrastive class token loss of one layer's tokens ``(C, D)`` of one picture."""
    unit = [token / math.sqrt((token**2).sum()) for token in tokens]
    present = [c for c, label in enumerate(labels) if label]
    losses = [-math.log(_softmax(np.array([u @ unit[c] for u in unit]))[c]) for c in present]
    return sum(losses) / len(losses)
