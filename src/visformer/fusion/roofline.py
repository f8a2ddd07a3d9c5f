"""How fast a network could be on a device: the roofline, layer by layer, from what the device itself shows.

    peak = measure(device, torch.bfloat16)
    seconds = bound(costs(model, batch_size=256, dtype=torch.bfloat16), peak)

Each layer takes at least the time of its products at the rate of a large product, and at least that of its inputs,
weights and result at the speed of a large copy; the sum of the longer one of each is the bound (after Williams,
Waterman and Patterson, "Roofline", CACM 52, 2009, taken by layers). It holds for layers computed one after another
whose maps pass through memory: where a cache holds them, or two layers are computed as one, it can be beaten.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visformer.distributed import wait
from visformer.fusion.fused import fuse
from visformer.fusion.network import AttentionOverMap
from visformer.fusion.operation import Cost, Operation, described
from visformer.models import Visformer

_SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices of the large product
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_SECONDS = 0.3  # that each is tried for, and five times at least
_SMI_FIELDS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"


class Peak(NamedTuple):
    """What a device does at most: floating-point operations of a product in one precision, and bytes read or written
    in memory, each a second."""

    flops_per_s: float
    bytes_per_s: float


class Layer(NamedTuple):
    """A layer of a fused network: what it is with its shapes, and what it costs."""

    name: str
    cost: Cost


def costs(
    model: Visformer, batch_size: int, dtype: torch.dtype, image_size: tuple[int, int] | None = None
) -> list[Layer]:
    """The layers that a batch passes through when `model` is fused, in order; nothing is computed.

    `image_size` is (height, width), None: the model's. An MLP counts as two layers. Norms that are left, and position
    embeddings that are added, count with their bytes.
    """
    fused = fuse(model, dtype=dtype, device="meta", choose="library", cuda_graphs=False)
    layers: list[Layer] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> None:
        if isinstance(module, Operation | AttentionOverMap):
            layers.append(Layer(module.signature(*inputs), module.cost(*inputs)))
        elif result is not inputs[0]:
            moved = (*inputs, result, *module.parameters(), *module.buffers())
            bytes_moved = sum(tensor.numel() * tensor.element_size() for tensor in moved)
            name = f"{type(module).__name__.lower()} {described(result.shape)}"
            layers.append(Layer(name, Cost(0, bytes_moved)))

    for module in fused.steps.modules():
        if not any(module.children()):
            module.register_forward_hook(record)
    height, width = image_size or model.config.image_size
    fused(torch.empty(batch_size, model.config.in_channels, height, width, dtype=dtype, device="meta"))
    return layers


def bound(layers: Sequence[Layer], peak: Peak) -> float:
    """Seconds that the layers take at least, one after another."""
    return sum(layer_bound(layer.cost, peak) for layer in layers)


def layer_bound(cost: Cost, peak: Peak) -> float:
    """Seconds that one layer takes at least."""
    return max(cost.flops / peak.flops_per_s, cost.bytes / peak.bytes_per_s)


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of several large products in `dtype` and of several large copies, on random numbers; on a CPU with the
    threads that torch uses. Takes about a second."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    side, size = _SIDES[kind], _COPIED_BYTES[kind]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    flops_per_s = 2 * side**3 / _best(lambda: torch.mm(left, right, out=product), device)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    bytes_per_s = 2 * size / _best(lambda: copy.copy_(source), device)
    return Peak(flops_per_s, bytes_per_s)


@torch.inference_mode()
def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after two that don't count."""
    taken: list[float] = []
    for _ in range(2):
        work()
    while len(taken) < 5 or sum(taken) < _SECONDS:
        taken.append(_seconds(work, device))
    return min(taken)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # type: ignore[call-arg]
    work()
    end.record()  # type: ignore[call-arg]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clocks(device: torch.device) -> dict[str, str]:
    """What the device says of its clocks now, in its maker's words; empty where it says nothing."""
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader", f"--id={device.index or 0}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        values = [value.strip() for value in done.stdout.strip().split(",")]
        names = _SMI_FIELDS.split(",")
        return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}
    try:
        with open("/proc/cpuinfo") as file:
            found = [line.split(":")[1].strip() for line in file if line.startswith("cpu MHz")]
    except OSError:
        return {}
    return {"cpu": f"{max(map(float, found)):.0f} MHz"} if found and device.type == "cpu" else {}
