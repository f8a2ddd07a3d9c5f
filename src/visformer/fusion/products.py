"""The products of a fused network: 1x1 convolutions, whole MLPs, attention, and the head.

Maps are (B, C, H, W) in channels_last memory, so that (B * H * W, C) is a view of them; M stands for B * H * W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer import kernels
from visformer.fusion.operation import (
    Candidates,
    Cost,
    Operation,
    activate,
    as_map,
    compiled,
    cost_of,
    described,
    rows,
    text,
)
from visformer.fusion.tuner import FP8, Run, Tuner
from visformer.kernels.launch import runs_triton
from visformer.models.attention import Windows


class Linear(Operation):
    """activation(W x + b) + residual at every position; with `fp8` also, or where the device can't and computes it in
    fp32 alone, with x and W rounded to eight bits (see `kernels.linear_fp8`)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        tuner: Tuner,
        like: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str = "none",
        fp8: bool = False,
    ):
        super().__init__(tuner)
        self.keep("weight", weight.flatten(1), like)
        self.keep("bias", bias, like)
        self.activation, self.fp8 = activation, fp8

    def signature(self, x: Tensor, residual: Tensor | None = None) -> str:
        """See `Operation`."""
        what = ("bias",) * (self.bias is not None) + ("residual",) * (residual is not None) + (self.activation,)
        return f"linear {described(x.shape, self.weight.shape)} {' '.join(what + ('fp8',) * self.fp8)}"

    def cost(self, x: Tensor, residual: Tensor | None = None) -> Cost:
        """See `Operation`."""
        result = (len(x), len(self.weight), *x.shape[2:])
        return cost_of(2 * math.prod(result) * x.shape[1], result, x, residual, self.bias, self.weight)

    def candidates(self, x: Tensor, residual: Tensor | None = None) -> Candidates:
        """The library's product, with what it can take along; as a convolution; compiled; our kernels."""
        weight, bias, activation = self.weight, self.bias, self.activation
        if self.fp8 and not runs_triton(x):
            return self._eight_bits(x)

        def library(x: Tensor, residual: Tensor | None = None) -> Tensor:
            result = activate(F.linear(rows(x), weight, bias), activation)
            return as_map(result if residual is None else result.add_(rows(residual)), x)

        def convolution(x: Tensor, residual: Tensor | None = None) -> Tensor:
            result = activate(F.conv2d(x, weight[:, :, None, None], bias), activation)
            return result if residual is None else result.add_(residual)

        found: Candidates = {"library": lambda: library, "convolution": lambda: convolution}
        if residual is not None and bias is None and activation == "none":
            found["addmm"] = lambda: lambda x, residual: as_map(torch.addmm(rows(residual), rows(x), weight.T), x)
        if x.device.type == "cuda":
            if activation == "gelu_tanh" and residual is None and bias is not None:
                found["epilogue"] = lambda: self._epilogue
            found["compiled"] = compiled(library, self.signature(x, residual))
        return found | self._kernels(x)

    def _epilogue(self, x: Tensor, residual: None = None) -> Tensor:
        """cuBLASLt's product that adds the bias and applies GELU, in its tanh form, before it writes."""
        return as_map(torch.ops.aten._addmm_activation(self.bias, rows(x), self.weight.T, use_gelu=True), x)

    def _kernels(self, x: Tensor) -> Candidates:
        linear = kernels.linear
        out_channels, in_channels = self.weight.shape
        tiles = linear.tiles(x.numel() // in_channels, in_channels, out_channels, x.dtype) if runs_triton(x) else []
        return (self._eight_bits(x) if self.fp8 else {}) | {
            f"kernel {text(tile)}": lambda tile=tile: (
                lambda x, residual=None: linear.linear(x, self.weight, self.bias, residual, self.activation, tile)
            )
            for tile in tiles
        }

    def _eight_bits(self, x: Tensor) -> Candidates:
        """Our kernel in eight bits, which elsewhere than on a GPU is emulated."""
        linear_fp8 = kernels.linear_fp8
        out_channels, in_channels = self.weight.shape
        tiles = linear_fp8.tiles(x.numel() // in_channels, in_channels, out_channels, x.dtype) if runs_triton(x) else []

        def build(tile: tuple[int, ...]) -> Run:
            weight, scale = linear_fp8.quantize_weight(self.weight)
            return lambda x, residual=None: linear_fp8.linear_fp8(
                x, weight, scale, self.bias, residual, self.activation, tile
            )

        return {f"{FP8} {text(tile)}": lambda tile=tile: build(tile) for tile in tiles or [()]}


class Mlp(Operation):
    """x + W2 activation(W1 x + b1): as two products, or as one that keeps the hidden map on the chip."""

    def __init__(self, tuner: Tuner, first: Linear, second: Linear):
        super().__init__(tuner)
        self.first, self.second = first, second

    def signature(self, x: Tensor) -> str:
        """See `Operation`."""
        return f"mlp {described(x.shape, self.first.weight.shape)} {self.first.activation}"

    def cost(self, x: Tensor) -> Cost:
        """See `Operation`; x serves as residual without being read again."""
        flops = 2 * math.prod(x.shape) * (len(self.first.weight) + len(self.second.weight[0]))
        read = (self.first.bias, self.second.bias, self.first.weight, self.second.weight)
        return cost_of(flops, tuple(x.shape), x, *read)

    def candidates(self, x: Tensor) -> Candidates:
        """Two products, each of them tuned by itself; our kernel."""
        first, second, mlp = self.first, self.second, kernels.mlp
        found: Candidates = {"two products": lambda: lambda x: second(first(x), x)}
        hidden, channels = first.weight.shape
        none = torch.zeros(channels, dtype=x.dtype, device=x.device)
        biases = tuple(none if bias is None else bias for bias in (first.bias, second.bias))
        if first.bias is None:
            return found
        return found | {
            f"kernel {text(tile)}": lambda tile=tile: (
                lambda x: mlp.mlp(x, first.weight, biases[0], second.weight, biases[1], x, first.activation, tile)
            )
            for tile in (mlp.tiles(x.numel() // channels, channels, hidden, x.dtype) if runs_triton(x) else [])
        }


class Attention(Operation):
    """softmax(q k^T + bias) v for every head, from the map of q, k and v, the scale being in q's weights.

    `windows` is how a map of this size is cut, None: not at all; `bias` is then (heads, N, N).
    """

    bias: Tensor

    def __init__(self, tuner: Tuner, num_heads: int, windows: Windows | None, like: Tensor, bias: Tensor | None):
        super().__init__(tuner)
        self.num_heads, self.windows = num_heads, windows
        self.keep("bias", bias, like)

    def signature(self, qkv: Tensor) -> str:
        """See `Operation`."""
        cut = "" if self.windows is None else f" windows {described(self.windows.size, self.windows.shift)}"
        return f"attention {described(qkv.shape)} {self.num_heads} heads{cut}"

    def cost(self, qkv: Tensor) -> Cost:
        """See `Operation`; a window that reaches beyond the map counts whole, the softmax not at all."""
        batch, channels, *sides = qkv.shape
        padded, size = (sides, sides) if self.windows is None else (self.windows.padded, self.windows.size)
        pairs = math.prod(padded) * math.prod(size)  # of a query and a key, for each image and head
        return cost_of(4 * batch * pairs * channels // 3, (batch, channels // 3, *sides), qkv, self.bias, qkv[:0])

    def candidates(self, qkv: Tensor) -> Candidates:
        """The library's attention; as products with a softmax between; our kernel."""
        library = self._whole() if self.windows is None else self._cut(self.windows)
        found: Candidates = {"library": lambda: library}
        if self.windows is None:
            found["products"] = lambda: self._products
        if qkv.device.type == "cuda":
            found["compiled"] = compiled(library, self.signature(qkv))
        return found | self._kernels(qkv)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (B, heads, N, d), views."""
        x = qkv.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 3 * heads * d)
        return x.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _whole(self) -> Run:
        def run(qkv: Tensor) -> Tensor:
            q, k, v = self._heads(qkv)
            x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            return as_map(x.transpose(1, 2).flatten(2).flatten(0, 1), qkv)

        return run

    def _products(self, qkv: Tensor) -> Tensor:
        q, k, v = self._heads(qkv)
        x = (q @ k.transpose(2, 3)).softmax(3) @ v
        return as_map(x.transpose(1, 2).flatten(2).flatten(0, 1), qkv)

    def _cut(self, windows: Windows) -> Run:
        mask = windows.mask(self.bias.float()).to(self.bias.dtype)  # (1, windows * heads, N, N)

        def run(qkv: Tensor) -> Tensor:
            q, k, v = windows.split(qkv, self.num_heads)
            return windows.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0), self.num_heads)

        return run

    def _kernels(self, qkv: Tensor) -> Candidates:
        attention, windows = kernels.attention, self.windows
        tokens = qkv.shape[2] * qkv.shape[3] if windows is None else windows.size[0] * windows.size[1]
        tiles = attention.tiles(tokens, qkv.shape[1] // (3 * self.num_heads), qkv.dtype) if runs_triton(qkv) else []
        cut = ((), ()) if windows is None else (windows.size, windows.shift)
        bias = None if self.bias is None or not tiles else attention.pack_bias(self.bias)
        return {
            f"kernel {text(tile)}": lambda tile=tile: (
                lambda qkv: attention.attention(qkv, self.num_heads, 1.0, bias, *cut, tile)
            )
            for tile in tiles
        }


class PoolHead(Operation):
    """W mean(x) + b, the mean over all positions: (B, C, H, W) -> (B, classes)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, tuner: Tuner, like: Tensor, weight: Tensor, bias: Tensor | None):
        super().__init__(tuner)
        self.keep("weight", weight, like)
        self.keep("bias", bias, like)

    def signature(self, x: Tensor) -> str:
        """See `Operation`."""
        return f"pool_head {described(x.shape, self.weight.shape)}"

    def cost(self, x: Tensor) -> Cost:
        """See `Operation`."""
        result = (len(x), len(self.weight))
        return cost_of(2 * math.prod(result) * x.shape[1], result, x, self.bias, self.weight)

    def candidates(self, x: Tensor) -> Candidates:
        """The library's mean and product; compiled; our kernel."""
        weight, bias, pool_head = self.weight, self.bias, kernels.pool_head

        def library(x: Tensor) -> Tensor:
            return F.linear(x.mean((2, 3)), weight, bias)

        found: Candidates = {"library": lambda: library}
        if x.device.type == "cuda":
            found["compiled"] = compiled(library, self.signature(x))
        shape = (*x.shape[:2], x.shape[2] * x.shape[3], weight.shape[0])
        return found | {
            f"kernel {text(tile)}": lambda tile=tile: lambda x: pool_head.pool_head(x, weight, bias, tile)
            for tile in (pool_head.tiles(*shape, x.dtype) if runs_triton(x) else [])
        }
