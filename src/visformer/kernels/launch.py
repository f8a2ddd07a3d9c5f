"""Where a kernel runs: compiled on a CUDA device, or read line by line by Triton's interpreter.

TRITON_INTERPRET=1, set before Triton is first imported, makes Triton interpret its kernels on the CPU: slow, and the
way to test them without a GPU. Everywhere else an operator computes its reference.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Item = TypeVar("_Item")

_TRUE = ("1", "true", "yes", "on", "y")  # what Triton itself takes for yes


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, by TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on `x` are Triton's: it lies on a CUDA device, or the interpreter is on."""
    return x.is_cuda or interpreted()


def kept(function: Callable[_Arguments, list[_Item]]) -> Callable[_Arguments, list[_Item]]:
    """`function`, a list for hashable arguments, computed once for each of them: an operator looks up its tile at every
    call, and ranking the candidates takes longer than a small kernel."""
    remember = functools.cache(lambda *args, **kwargs: tuple(function(*args, **kwargs)))

    @functools.wraps(function)
    def copied(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> list[_Item]:
        return list(remember(*args, **kwargs))

    return copied
