"""Weights and input that make every part of a network matter, the same in each framework; needs only numpy.

Freshly initialised networks hide mistakes: norms of scale 1 and statistics (0, 1) do nothing, biases are zero, position
embeddings are too small to be seen. Here each tensor is drawn from a generator seeded by its own name, so that a file
can be written again bit for bit, whatever the order in which a framework lists its parameters.
"""

from __future__ import annotations

import zlib

import numpy as np

SEED = 20260


def value(name: str, shape: tuple[int, ...], variant: int = 0) -> np.ndarray:
    """float32 values for the parameter or buffer `name` (MindCV's, the authors' or timm's naming) of that shape.

    Another `variant` gives other values: an average of the weights that differs from the weights, for one.
    """
    random = np.random.default_rng([SEED, variant, zlib.crc32(name.encode())])
    last = name.rsplit(".", 1)[-1]
    if name.startswith("pos_embed"):
        result = random.normal(0, 0.1, shape)
    elif last == "relative_position_bias_table":
        result = random.normal(0, 0.5, shape)
    elif last in ("running_var", "moving_variance"):
        result = random.uniform(1.0, 4.0, shape)
    elif last in ("running_mean", "moving_mean"):
        result = random.normal(0, 0.3, shape)
    elif last in ("bias", "beta"):
        result = random.normal(0, 0.2, shape)
    elif last == "gamma" or _of_a_norm(name):
        result = random.uniform(0.5, 1.5, shape)
    else:
        result = random.normal(0, _gain(name) / np.sqrt(np.prod(shape[1:])), shape)
    return result.astype(np.float32)


def image_batch(size: int = 224, count: int = 2) -> np.ndarray:
    """float32 (count, 3, size, size), as after normalisation: a coarse pattern, in different strength, and noise."""
    random = np.random.default_rng([SEED, size])
    coarse = random.normal(0, 1, (count, 3, size // 16, size // 16)).repeat(16, axis=2).repeat(16, axis=3)
    return (coarse * np.linspace(0.5, 1.5, count)[:, None, None, None] + random.normal(0, 0.5, coarse.shape)).astype(
        np.float32
    )


def _of_a_norm(name: str) -> bool:
    """Whether `name` is the scale of a norm, which the three projects call norm, norm1, norm2, bn, ln or stem.1."""
    owner = name.split(".")[:-1]
    return bool(owner) and (owner[-1].startswith("norm") or owner[-1] in ("bn", "ln") or owner[-2:] == ["stem", "1"])


def _gain(name: str) -> float:
    """Attention and the head get larger weights, so that the softmax is not flat and the classes differ.

    What a block adds to its input gets smaller ones: the norms' statistics are not those of the features, so that
    nothing else keeps thirty blocks from growing without bound, and float32 from losing what there is to compare.
    """
    if "qkv" in name or name.startswith("head"):
        return 2.0
    return 0.25 if "attn.proj" in name or "mlp.conv3" in name else 1.0
