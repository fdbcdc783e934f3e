"""Slow reference for EDAM: one token, one head at a time."""

import math

import numpy as np


def masks(responses: np.ndarray) -> np.ndarray:
    """Absolute values of the unit vector at each position of ``(n, h, w)``."""
    result = np.zeros_like(responses)
    for y, x in np.ndindex(responses.shape[1:]):
        vector = responses[:, y, x]
        result[:, y, x] = np.abs(vector) / np.sqrt((vector * vector).sum())
    return result


def position(place: int, dim: int) -> np.ndarray:
    """Sine at even and cosine at odd channels."""
    result = np.zeros(dim)
    for i in range(0, dim, 2):
        angle = place / 10_000 ** (i / dim)
        result[i], result[i + 1] = math.sin(angle), math.cos(angle)
    return result


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Of one token."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def gelu(x: float) -> float:
    """Gaussian error linear unit."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def attention(tokens: np.ndarray, heads: int, p: dict[str, np.ndarray]) -> np.ndarray:
    """Pre-norm transformer block on tokens ``(n, D)``, as torch names its parameters."""
    n, dim = tokens.shape
    width = dim // heads
    normed = [layer_norm(t, p["norm1.weight"], p["norm1.bias"]) for t in tokens]
    projected = [p["self_attn.in_proj_weight"] @ t + p["self_attn.in_proj_bias"] for t in normed]
    mixed = np.zeros((n, dim))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        query, key, value = (
            [v[k * dim : (k + 1) * dim][part] for v in projected] for k in range(3)
        )
        for i in range(n):
            scores = np.array([(query[i] * key[j]).sum() / math.sqrt(width) for j in range(n)])
            shares = np.exp(scores) / np.exp(scores).sum()
            mixed[i, part] = sum(s * v for s, v in zip(shares, value, strict=True))
    out = tokens + mixed @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]
    result = []
    for token in out:
        hidden = layer_norm(token, p["norm2.weight"], p["norm2.bias"])
        hidden = p["linear1.weight"] @ hidden + p["linear1.bias"]
        hidden = np.array([gelu(float(h)) for h in hidden])
        result.append(token + p["linear2.weight"] @ hidden + p["linear2.bias"])
    return np.array(result)


def pair_scores(masked: np.ndarray, heads: int, p: dict[str, np.ndarray]) -> list[float]:
    """Scores of both pictures of a pair ``(2, D, h, w)``."""
    _, dim, height, width = masked.shape
    tokens = []
    for which in range(2):
        for place in range(height * width):
            y, x = divmod(place, width)
            token = masked[which, :, y, x] + position(place, dim) + p["which"][which]
            tokens.append(token)
    block = {k.removeprefix("block."): v for k, v in p.items() if k.startswith("block.")}
    found = attention(np.array(tokens), heads, block)
    halves = (found[: height * width], found[height * width :])
    return [float(p["score.weight"][0] @ half.mean(0) + p["score.bias"][0]) for half in halves]
