"""Attention of a training step in bf16 and in fp32, on the CPU, by PyTorch's own operator.

    python benchmarks/attention_precision.py

For the maps of visformer_tiny's last two stages at several image sizes: milliseconds of a forward and a backward pass
(medians) with q, k and v in bf16, and with them taken to fp32 and the result back, as `fusion/training.py` does.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from visformer.fusion.training import SinglePrecision
from visformer.models.attention import ScaledDotProduct

HEADS = 6
CASES = ((32, 128), (64, 128), (128, 32), (224, 16), (320, 4))  # image size in pixels, batch size
REPEATS = 9


def main() -> None:
    """Print a line for each map."""
    print(f"{'image':>5} {'batch':>5} {'channels':>8} {'positions':>9} {'bf16 ms':>8} {'in fp32':>8} {'ratio':>6}")
    for side, batch in CASES:
        for channels, cell in ((192, 16), (384, 32)):
            count = (side // cell) ** 2
            attend = ScaledDotProduct((channels // HEADS) ** -0.5, 0.0)
            ways = {"bf16": attend, "fp32": SinglePrecision(attend)}
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(REPEATS + 1):
                for name, way in ways.items():
                    taken[name].append(seconds(way, batch, channels, count))
            half, single = (1000 * statistics.median(taken[name][1:]) for name in ways)  # the first warms up
            ratio = half / single
            print(f"{side:5} {batch:5} {channels:8} {count:9} {half:8.2f} {single:8.2f} {ratio:6.2f}", flush=True)


def seconds(attend: nn.Module, batch: int, channels: int, count: int) -> float:
    """Of a forward and a backward pass, from qkv as a 1x1 convolution leaves it to its gradient."""
    qkv = torch.randn(batch, count, 3, HEADS, channels // HEADS).to(torch.bfloat16).requires_grad_()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    y.transpose(1, 2).reshape(batch, count, channels).sum().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
