"""Kernels of our own for what the libraries are slow at, each with its reference in plain PyTorch.

    from visformer.kernels import grouped_conv
    y = grouped_conv.grouped_conv(x, weight, groups=8, activation="gelu")

A module for each idea: a reference, an operator `torch.ops.visformer.<idea>` that torch.compile and torch.export see
as one node, `tiles(...)` with the candidates of block sizes, and beside it `<idea>_triton` with the Triton kernel.
Maps are (B, C, H, W) tensors in channels_last memory. On a CUDA device the kernel runs, elsewhere the reference.
Importing a module needs no Triton, and importing the package not even torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visformer.kernels import attention, grouped_conv, linear, linear_fp8, mlp, patch_embed, pool_head, stem

__all__ = ["attention", "grouped_conv", "linear", "linear_fp8", "mlp", "patch_embed", "pool_head", "stem"]


def __getattr__(name: str) -> ModuleType:
    """Import a kernel's module when it is first used (PEP 562)."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
