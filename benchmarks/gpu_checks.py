"""Whether the kernels compute what they should, here: the first part of `gpu_suite.py`.

    python3 benchmarks/gpu_checks.py --device cuda

Each kernel, those of the gradients included, is held against its reference in float64 at shapes that no tile divides.
Writes a JSON object; exit code 1 and a line on stderr when one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from visformer.errors import RunError
from visformer.kernels import attention, grouped_conv, linear, linear_fp8, mlp, patch_embed, pool_head, stem

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value, against float64
_MEAN, _STD = (120.0, 115.0, 104.0), (58.0, 57.0, 57.5)  # of bytes


class Case(NamedTuple):
    """A kernel at a shape: its tiles, the best guess first; the kernel with a tile; its reference in float64."""

    name: str
    tiles: Sequence[tuple[int, ...]]
    run: Callable[[tuple[int, ...]], Tensor]
    expected: Callable[[], Tensor]


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Each kernel with its first tiles, two in bf16 and one in fp32, against its reference.

    Returns the largest difference of each in units of the largest value; raises `RunError` when one is too large.
    """
    found: dict[str, float] = {}
    wrong: list[str] = []
    for dtype, tolerance in TOLERANCES.items():
        for case in cases(device, dtype):
            key, exact = f"{case.name} {_text(dtype)}", case.expected()
            refused: list[str] = []
            left = 1 if dtype == torch.float32 else 2  # compiling takes its time
            for tile in case.tiles:
                try:
                    result = case.run(tile).double()
                except Exception as error:  # a tile that is too large for this device
                    refused.append(f"{key}, tile {tuple(tile)}: {type(error).__name__}: {' '.join(str(error).split())}")
                    continue
                off_by = float((result - exact).abs().max() / exact.abs().max())
                found[key] = max(off_by, found.get(key, 0.0))
                if not off_by <= tolerance:
                    wrong.append(f"{key}, tile {tuple(tile)}: off by {off_by:.1e}, where {tolerance:.0e} is allowed")
                left -= 1
                if not left:
                    break
            if case.tiles and key not in found:
                wrong.append(f"no tile runs here: {refused[0][:300]}")
    if wrong:
        raise RunError("; ".join(wrong))
    return {"off_by": found, "limits": {_text(dtype): limit for dtype, limit in TOLERANCES.items()}}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel in `dtype`; of eight-bit products in bf16 alone, where rounding the other way is within bounds."""
    draw = _Draw(device, dtype)
    yield from _products(draw)
    yield from _attention(draw)
    yield from _grouped(draw)
    yield from _ends(draw)


class _Draw:
    """Normally distributed values of a shape, maps in channels_last memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = (scale * torch.randn(shape, generator=self.generator)).to(self.device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def pixels(self, *shape: int) -> Tensor:
        """uint8 in [0, 255]"""
        values = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8).to(self.device)
        return values.contiguous(memory_format=torch.channels_last)


def _products(draw: _Draw) -> Iterator[Case]:
    x, w, b, r = draw(3, 96, 9, 11), draw(72, 96, scale=0.1), draw(72), draw(3, 72, 9, 11)
    yield Case(
        "linear",
        linear.tiles(297, 96, 72, draw.dtype),
        lambda tile: linear.linear(x, w, b, r, "gelu", tile),
        _exactly(linear.linear_reference, x, w, b, r, "gelu"),
    )
    if draw.dtype == torch.bfloat16 and _has_fp8(draw.device):
        eight, scale = linear_fp8.quantize_weight(w)
        yield Case(
            "linear_fp8",
            linear_fp8.tiles(297, 96, 72, draw.dtype),
            lambda tile: linear_fp8.linear_fp8(x, eight, scale, b, r, "gelu", tile),
            lambda: linear_fp8.linear_fp8_reference(x.float(), eight, scale, b, r, "gelu").double(),
        )
    first, second = draw(192, 96, scale=0.1), draw(96, 192, scale=0.1)
    first_b, second_b = draw(192), draw(96)
    yield Case(
        "mlp",
        mlp.tiles(297, 96, 192, draw.dtype),
        lambda tile: mlp.mlp(x, first, first_b, second, second_b, x, "gelu", tile),
        _exactly(mlp.mlp_reference, x, first, first_b, second, second_b, x, "gelu"),
    )


def _attention(draw: _Draw) -> Iterator[Case]:
    qkv, bias = draw(2, 3 * 3 * 32, 9, 11), draw(3, 16, 16)
    yield Case(
        "attention",
        attention.tiles(99, 32, draw.dtype),
        lambda tile: attention.attention(qkv, 3, 0.2, tile=tile),
        _exactly(attention.attention_reference, qkv, 3, 0.2),
    )
    yield Case(
        "attention in windows",
        attention.tiles(16, 32, draw.dtype),
        lambda tile: attention.attention(qkv, 3, 0.2, attention.pack_bias(bias), (4, 4), (2, 2), tile),
        _exactly(attention.attention_reference, qkv, 3, 0.2, bias, (4, 4), (2, 2)),
    )


def _grouped(draw: _Draw) -> Iterator[Case]:
    weight, x, grad = draw(48, 12, 3, 3, scale=0.1), draw(3, 48, 9, 11), draw(3, 48, 9, 11)
    shape = (3, 48, 9, 11, 4, draw.dtype)
    yield Case(
        "grouped_conv",
        grouped_conv.tiles(*shape),
        lambda tile: grouped_conv.grouped_conv(x, grouped_conv.pack_weight(weight, 4, tile), None, 4, "gelu", tile),
        _exactly(grouped_conv.grouped_conv_reference, x, weight, None, 4, "gelu"),
    )
    yield Case(
        "grouped_conv, gradient before GELU",
        grouped_conv.tiles(*shape),
        lambda tile: torch.ops.visformer.grouped_conv_activation_grad(grad, x, weight, None, 4, "gelu", tile),
        lambda: torch.ops.aten.gelu_backward(
            grad.double(), grouped_conv.grouped_conv_reference(x.double(), weight.double(), None, 4)
        ),
    )
    yield Case(
        "grouped_conv, gradient of the weight",
        grouped_conv.weight_grad_tiles(*shape),
        lambda tile: torch.ops.visformer.grouped_conv_weight_grad(grad, x, 4, tile),
        lambda: conv2d_weight(x.double(), weight.shape, grad.double(), padding=1, groups=4),
    )


def _ends(draw: _Draw) -> Iterator[Case]:
    """The stem, of numbers and of bytes, whose rows are a multiple of four of them or not; patches; pooling, head."""
    weight, bias = draw(16, 3, 7, 7, scale=0.1), draw(16)
    image = draw(2, 3, 30, 46)
    yield Case(
        "stem",
        stem.tiles(2, 3, 30, 46, 16, draw.dtype, draw.dtype),
        lambda tile: stem.stem(image, stem.pack_weight(weight, tile), bias, tile),
        _exactly(stem.stem_reference, image, weight, bias),
    )
    for width in (44, 46):
        yield _stem_of_bytes(draw.pixels(2, 3, 30, width), weight, bias)
    patches, flat, patch_b = draw(2, 16, 24, 40), draw(96, 16 * 16, scale=0.1), draw(60, 96)
    yield Case(
        "patch_embed",
        patch_embed.tiles(2, 16, 24, 40, 96, 4, draw.dtype),
        lambda tile: patch_embed.patch_embed(patches, flat, patch_b, 4, tile),
        _exactly(patch_embed.patch_embed_reference, patches, flat, patch_b, 4),
    )
    x, head_w, head_b = draw(3, 96, 9, 11), draw(100, 96, scale=0.1), draw(100)
    yield Case(
        "pool_head",
        pool_head.tiles(3, 96, 99, 100, draw.dtype),
        lambda tile: pool_head.pool_head(x, head_w, head_b, tile),
        _exactly(pool_head.pool_head_reference, x, head_w, head_b),
    )


def _stem_of_bytes(pixels: Tensor, weight: Tensor, bias: Tensor) -> Case:
    folded, table = stem.fold_normalisation(weight, bias, _MEAN, _STD)
    read = "words" if pixels.shape[3] * 3 % 4 == 0 else "bytes"
    return Case(
        f"stem of {read}",
        stem.tiles(*pixels.shape, len(weight), torch.uint8, weight.dtype),
        lambda tile: stem.stem(pixels, stem.pack_weight(folded, tile), table, tile),
        lambda: stem.stem_reference(pixels, folded.double(), table.double()),
    )


def _exactly(reference: Callable[..., Tensor], *inputs: Any) -> Callable[[], Tensor]:
    return lambda: reference(*(one.double() if isinstance(one, Tensor) else one for one in inputs))


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    """Check all kernels on the device that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    try:
        print(json.dumps(check_kernels(torch.device(parser.parse_args().device))))
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
