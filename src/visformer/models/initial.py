"""Initial values, as upstream states them.

On the meta device, where a model is built only to be given weights, nothing is drawn: torch would load its compiler to
work out what normal numbers without memory look like.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import init


def he_normal_(weight: Tensor) -> None:
    """He normal over fan out, for a convolution's weight."""
    if not weight.is_meta:
        init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def small_normal_(weight: Tensor) -> None:
    """Truncated normal, standard deviation 0.02: the head, position embeddings and position biases."""
    if not weight.is_meta:
        init.trunc_normal_(weight, std=0.02)
