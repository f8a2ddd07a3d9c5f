"""The kernel of `attention`: a block of queries of one head, keys and values streamed.

Logits are kept in powers of two, because the hardware's exponential is. What a query must not see gets a large
negative logit rather than minus infinity, so that a block of keys of which a query sees none leaves no NaN: it counts
for nothing as soon as the query meets itself.
"""

# Triton's own annotations know neither launch options nor its loops.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.linear import power_of_two
from visformer.kernels.linear_triton import fp32_precision, must_widen, product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def corner(number, height, width, window_height: tl.constexpr, window_width: tl.constexpr):
    """Of a window by its number through all images: image, and row and column of its first place."""
    if window_height == 0:
        return number, 0, 0
    across = tl.cdiv(width, window_width)
    windows = tl.cdiv(height, window_height) * across
    window = number % windows
    return number // windows, window // across * window_height, window % across * window_width


@triton.jit
def locate(token, tokens, corner, size, shift, window_height: tl.constexpr, window_width: tl.constexpr):
    """Where the tokens of a window lie: position in the map, whether there is one, and which ends came round."""
    inside = token < tokens
    position = token
    came_round = token * 0
    if window_height > 0:
        padded_height = tl.cdiv(size[0], window_height) * window_height
        padded_width = tl.cdiv(size[1], window_width) * window_width
        row = corner[0] + token // window_width
        column = corner[1] + token % window_width
        came_round = 2 * (row >= padded_height - shift[0]).to(tl.int32)
        came_round += (column >= padded_width - shift[1]).to(tl.int32)
        row += shift[0]
        row = tl.where(row >= padded_height, row - padded_height, row)
        column += shift[1]
        column = tl.where(column >= padded_width, column - padded_width, column)
        inside = inside & (row < size[0]) & (column < size[1])
        position = row * size[1] + column
    return position, inside, came_round


@triton.jit
def absorb(logits, v, highest, weight, total, precision: tl.constexpr, widen: tl.constexpr):
    """Take a block of keys into the running softmax: its highest logit, sum of weights and weighted sum of values."""
    above = tl.maximum(highest, tl.max(logits, 1))
    shares = tl.exp2(logits - above[:, None])
    kept = tl.exp2(highest - above)
    total = product(shares.to(v.dtype), v, total * kept[:, None], precision, widen)
    return above, weight * kept + tl.sum(shares, 1), total


@triton.jit(do_not_specialize=["heads", "tokens", "height", "width", "shift_rows", "shift_columns"])
def attention_kernel(
    qkv,  # (images, height * width, 3, heads, head_dim)
    bias,  # (heads, tokens, bias_width)
    out,  # (images, height * width, heads, head_dim)
    scale,
    heads,
    tokens,
    bias_width,
    height,
    width,
    shift_rows,
    shift_columns,
    has_bias: tl.constexpr,
    shifted: tl.constexpr,
    window_height: tl.constexpr,  # 0: all positions of the map
    window_width: tl.constexpr,
    head_dim: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
):
    head, blocks = tl.program_id(0) % heads, tl.cdiv(tokens, block_queries)
    block = tl.program_id(0) // heads
    query = (block % blocks) * block_queries + tl.arange(0, block_queries)
    image, row, column = corner(block // blocks, height, width, window_height, window_width)
    first, size, shift = (row, column), (height, width), (shift_rows, shift_columns)
    position, stored, own_region = locate(query, tokens, first, size, shift, window_height, window_width)
    dim = tl.arange(0, block_dim)
    stored = stored[:, None] & (dim < head_dim)[None, :]
    stride = heads * head_dim
    base = qkv + image.to(tl.int64) * (height * width) * (3 * stride) + head * head_dim + dim[None, :]
    q = tl.load(base + position[:, None] * (3 * stride), mask=stored, other=0.0)
    bias_row = bias + head * tokens * bias_width + tl.minimum(query, tokens - 1)[:, None] * bias_width

    highest = tl.full((block_queries,), -1e30, dtype=tl.float32)
    weight = tl.zeros((block_queries,), dtype=tl.float32)
    total = tl.zeros((block_queries, block_dim), dtype=tl.float32)
    for start in range(0, tokens, block_keys):
        key = start + tl.arange(0, block_keys)
        source, inside, region = locate(key, tokens, first, size, shift, window_height, window_width)
        loaded = inside[:, None] & (dim < head_dim)[None, :]
        k = tl.load(base + stride + source[:, None] * (3 * stride), mask=loaded, other=0.0)
        v = tl.load(base + 2 * stride + source[:, None] * (3 * stride), mask=loaded, other=0.0)
        logits = product(q, tl.trans(k), tl.zeros((block_queries, block_keys), tl.float32), precision, widen)
        logits *= scale * LOG2_E
        if has_bias:
            added = tl.load(bias_row + key[None, :], mask=(key < bias_width)[None, :], other=0.0)
            logits += added.to(tl.float32) * LOG2_E
        seen = inside[None, :]
        if shifted:
            seen = seen & (own_region[:, None] == region[None, :])
        logits = tl.where(seen, logits, -1e30)
        highest, weight, total = absorb(logits, v, highest, weight, total, precision, widen)

    out_base = out + image.to(tl.int64) * (height * width) * stride + head * head_dim + dim[None, :]
    total = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out_base + position[:, None] * stride, total, mask=stored)


def launch_attention(
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    num_heads: int,
    scale: float,
    window: tuple[int, int],
    shift: tuple[int, int],
    tile: tuple[int, ...],
) -> None:
    """Fill `out` (B, heads * d, H, W) from `qkv` (B, 3 * heads * d, H, W); both channels_last, `bias` by rows."""
    block_queries, block_keys, num_warps, num_stages = tile
    batch, channels, height, width = qkv.shape
    if height * width * channels >= 2**31:
        raise UsageError(f"attention: one image's map of {height}x{width}x{channels} has more than 2^31 values")
    head_dim = channels // (3 * num_heads)
    tokens = window[0] * window[1]
    windows = triton.cdiv(height, window[0]) * triton.cdiv(width, window[1])
    cut = (0, 0) if window == (height, width) else window
    attention_kernel[(batch * windows * triton.cdiv(tokens, block_queries) * num_heads,)](
        qkv,
        qkv if bias is None else bias,
        out,
        scale,
        num_heads,
        tokens,
        0 if bias is None else bias.stride(1),
        height,
        width,
        *shift,
        has_bias=bias is not None,
        shifted=shift != (0, 0),
        window_height=cut[0],
        window_width=cut[1],
        head_dim=head_dim,
        precision=fp32_precision(),
        widen=must_widen(qkv.dtype),
        block_dim=power_of_two(head_dim),
        block_queries=block_queries,
        block_keys=block_keys,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
