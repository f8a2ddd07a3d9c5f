"""One step of a fused network, computed in whichever way is fastest for the shape at hand.

An `Operation` holds its weights as buffers and knows several ways (`candidates`) to compute its equation. The first
call with a shape chooses among them, by measuring or by what was measured before (`tuner.py`), and builds the chosen
one: packs its weights, compiles it. Later calls look it up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer.fusion.tuner import Run, Tuner

Candidates = dict[str, Callable[[], Run]]
_CODES: dict[tuple[CodeType, str], CodeType] = {}  # of what is compiled


class Cost(NamedTuple):
    """What an operation takes at least: the products' floating-point operations, a multiplication and an addition being
    two, and the bytes of memory when each input and weight is read once and the result written once."""

    flops: int
    bytes: int


class Operation(nn.Module, ABC):
    """`forward(*inputs)` is `candidates(*inputs)["library"]()(*inputs)`, to within rounding."""

    def __init__(self, tuner: Tuner):
        super().__init__()
        self._tuner = tuner
        self._runs: dict[tuple, Run] = {}

    @abstractmethod
    def candidates(self, *inputs: Any) -> Candidates:
        """The ways to compute this for such inputs, each built when called; the first is the library's, and none
        changes an input."""

    @abstractmethod
    def signature(self, *inputs: Any) -> str:
        """What the operation is and its shapes."""

    @abstractmethod
    def cost(self, *inputs: Any) -> Cost:
        """Counted from the shapes; see `Cost`."""

    def forward(self, *inputs: Any) -> Tensor:
        """See the class."""
        key = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in inputs)
        run = self._runs.get(key) or self._choose(key, inputs)
        return run(*inputs)

    def _choose(self, key: tuple, inputs: tuple[Any, ...]) -> Run:
        chosen = self._tuner.choose(self.signature(*inputs), self.candidates(*inputs), inputs)
        self._runs[key] = chosen
        return chosen

    def keep(self, name: str, values: Tensor | None, like: Tensor) -> None:
        """Register a buffer of `values` in the dtype and on the device of `like`."""
        self.register_buffer(name, None if values is None else values.to(like).contiguous(), persistent=True)


def compiled(function: Run, signature: str) -> Callable[[], Run]:
    """A candidate: `function` through torch.compile, for fixed shapes.

    torch.compile keeps what it compiled by the code of a function, and refuses after eight: layers of one kind share
    their code. So there is a copy for each `signature`, which says what the function is compiled for; layers of the
    same signature then share what was compiled for the first. Whatever differs between them, the function must hold as
    tensors.
    """

    def build() -> Run:
        assert isinstance(function, FunctionType)
        plain = function.__code__
        code = _CODES.setdefault((plain, signature), plain.replace(co_name=f"{plain.co_name}_{len(_CODES)}"))
        own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
        return torch.compile(own, dynamic=False, fullgraph=True)

    return build


def cost_of(flops: int, result: tuple[int, ...], *read: Tensor | None) -> Cost:
    """The cost of `flops` on what is `read`, the first of it an input, that gives a tensor of the shape `result`, of
    the dtype of the last."""
    there = [tensor for tensor in read if tensor is not None]
    written = math.prod(result) * there[-1].element_size()
    return Cost(flops, written + sum(tensor.numel() * tensor.element_size() for tensor in there))


def described(*shapes: Any) -> str:
    """Shapes as text: (8, 3, 224, 224) and (16,) as 8x3x224x224 16."""
    return " ".join("x".join(map(str, shape)) for shape in shapes if shape is not None)


def activate(x: Tensor, activation: str) -> Tensor:
    """`x` behind an activation: none, relu, gelu (by the error function) or gelu_tanh."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    form = "tanh" if activation == "gelu_tanh" else "none"
    return map_gelu(x, form) if x.dim() == 4 else F.gelu(x, approximate=form)


def map_gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, in PyTorch's form `approximate`, of a channels_last map (B, C, H, W), seen as (B, H, W, C), as it lies in
    memory: for that oneDNN has one of half the time."""
    return F.gelu(x.permute(0, 2, 3, 1), approximate=approximate).permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last memory as (B * H * W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def as_map(values: Tensor, like: Tensor) -> Tensor:
    """(B * H * W, C) as (B, C, H, W) of the batch and sides of `like`, a view."""
    batch, _, height, width = like.shape
    return values.view(batch, height, width, -1).permute(0, 3, 1, 2)


def text(tile: tuple[int, ...]) -> str:
    """A tile's numbers, with commas."""
    return ",".join(map(str, tile))
