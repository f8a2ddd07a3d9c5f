"""A model made fast for inference: see `fuse`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visformer.fusion.fused import Fused, fuse

__all__ = ["Fused", "fuse"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used (PEP 562), so that `folding` can be had alone."""
    if name in __all__:
        return getattr(importlib.import_module("visformer.fusion.fused"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
