"""The parts of `gpu_suite.py`: what is measured, each as a function that returns a record for the document."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_prepare
import torch
from torch import Tensor, nn

from visformer import kernels
from visformer.errors import RunError
from visformer.fusion import roofline
from visformer.fusion.fused import fuse
from visformer.fusion.operation import Operation
from visformer.models import create_model
from visformer.verbs import bench_infer, bench_timm
from visformer.verbs.bench import BenchOptions, bench
from visformer.verbs.bench_timing import TURN_S, Contender, in_turns, summarize

ROOT = Path(__file__).resolve().parents[1]
TIMMS = ("visformer_tiny", "visformer_small")  # that timm has too
_PROCESS_BYTES = 6 << 30  # of the device's memory, for each process that compiles
_PEER_LIMIT = 0.3  # of the largest logit: a peer is the same function, as exact as it may be
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value, against float64


@dataclass(frozen=True)
class Setting:
    """Where and how large: `quick` is for looking whether the suite works, not for figures."""

    device: torch.device
    image_size: int
    quick: bool

    @property
    def precision(self) -> str:
        """That of inference."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def rounds(self) -> int:
        """Turns of each contender."""
        return 3 if self.quick else 15


# ---- the kernels' numbers


def check_kernels(setting: Setting) -> dict[str, Any]:
    """Each kernel with its first tiles, two in bf16 and one in fp32, against its reference in float64, at shapes that
    no tile divides.

    Returns the largest difference of each in units of the largest value; raises `RunError` when one is too large.
    """
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for dtype, tolerance in _TOLERANCES.items():
        for name, tiles, run, expected in _kernel_cases(setting.device, dtype):
            key, exact = f"{name} {str(dtype).removeprefix('torch.')}", expected()
            refused: list[str] = []
            left = 1 if dtype == torch.float32 else 2  # compiling takes its time
            for tile in tiles:
                try:
                    result = run(tile).double()
                except Exception as error:  # a tile that is too large for this device
                    refused.append(f"{key}, tile {tuple(tile)}: {_line(error)}")
                    continue
                off_by = float((result - exact).abs().max() / exact.abs().max())
                found[key] = max(off_by, found.get(key, 0.0))
                if not off_by <= tolerance:
                    wrong.append(f"{key}, tile {tuple(tile)}: off by {off_by:.1e}, where {tolerance:.0e} is allowed")
                left -= 1
                if not left:
                    break
            if tiles and key not in found:
                wrong.append(f"no tile runs here: {refused[0]}")
    if wrong:
        raise RunError("; ".join(wrong))
    return {"off_by": found, "limits": {str(d).removeprefix("torch."): t for d, t in _TOLERANCES.items()}}


def _kernel_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[str, list, Callable, Callable]]:
    """(name, tiles, the kernel with a tile, its reference in float64)"""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def exact(reference: Callable, *inputs: Any) -> Callable:
        return lambda: reference(*(one.double() if isinstance(one, Tensor) else one for one in inputs))

    k = kernels
    x, w, b, r = draw(3, 96, 9, 11), draw(72, 96, scale=0.1), draw(72), draw(3, 72, 9, 11)
    qkv, bias = draw(2, 3 * 3 * 32, 9, 11), draw(3, 16, 16)
    grouped, hidden = draw(48, 12, 3, 3, scale=0.1), draw(3, 48, 9, 11)
    second, channels = draw(96, 192, scale=0.1), draw(192, 96, scale=0.1)
    image, stem_w, stem_b = draw(2, 3, 30, 46), draw(16, 3, 7, 7, scale=0.1), draw(16)
    patches, flat, patch_b = draw(2, 16, 24, 40), draw(96, 16 * 16, scale=0.1), draw(60, 96)
    head_w, head_b = draw(100, 96, scale=0.1), draw(100)
    first_b, second_b = draw(192), draw(96)
    return [
        (
            "linear",
            k.linear.tiles(297, 96, 72, dtype),
            lambda tile: k.linear.linear(x, w, b, r, "gelu", tile),
            exact(k.linear.linear_reference, x, w, b, r, "gelu"),
        ),
        (
            "attention",
            k.attention.tiles(99, 32, dtype),
            lambda tile: k.attention.attention(qkv, 3, 0.2, tile=tile),
            exact(k.attention.attention_reference, qkv, 3, 0.2),
        ),
        (
            "attention in windows",
            k.attention.tiles(16, 32, dtype),
            lambda tile: k.attention.attention(qkv, 3, 0.2, k.attention.pack_bias(bias), (4, 4), (2, 2), tile),
            exact(k.attention.attention_reference, qkv, 3, 0.2, bias, (4, 4), (2, 2)),
        ),
        (
            "grouped_conv",
            k.grouped_conv.tiles(3, 48, 9, 11, 4, dtype),
            lambda tile: k.grouped_conv.grouped_conv(
                hidden, k.grouped_conv.pack_weight(grouped, 4, tile), None, 4, "gelu", tile
            ),
            exact(k.grouped_conv.grouped_conv_reference, hidden, grouped, None, 4, "gelu"),
        ),
        (
            "mlp",
            k.mlp.tiles(297, 96, 192, dtype),
            lambda tile: k.mlp.mlp(x, channels, first_b, second, second_b, x, "gelu", tile),
            exact(k.mlp.mlp_reference, x, channels, first_b, second, second_b, x, "gelu"),
        ),
        (
            "stem",
            k.stem.tiles(2, 3, 30, 46, 16, dtype, dtype),
            lambda tile: k.stem.stem(image, k.stem.pack_weight(stem_w, tile), stem_b, tile),
            exact(k.stem.stem_reference, image, stem_w, stem_b),
        ),
        (
            "patch_embed",
            k.patch_embed.tiles(2, 16, 24, 40, 96, 4, dtype),
            lambda tile: k.patch_embed.patch_embed(patches, flat, patch_b, 4, tile),
            exact(k.patch_embed.patch_embed_reference, patches, flat, patch_b, 4),
        ),
        (
            "pool_head",
            k.pool_head.tiles(3, 96, 99, 100, dtype),
            lambda tile: k.pool_head.pool_head(x, head_w, head_b, tile),
            exact(k.pool_head.pool_head_reference, x, head_w, head_b),
        ),
    ]


# ---- inference


def infer(setting: Setting, name: str, batch_size: int, timeout_s: float) -> dict[str, Any]:
    """A model fused and tuned beside its peers: images a second, shares of the roofline, and each layer's times."""
    pair = _models(name, setting.image_size)
    prepared = None
    if setting.device.type == "cuda":
        most = torch.cuda.get_device_properties(setting.device).total_memory // _PROCESS_BYTES
        described = (name, batch_size, setting.image_size, setting.precision)
        prepared = gpu_prepare.prepare(*described, most=max(1, most), timeout_s=timeout_s)
    images = torch.randn(batch_size, 3, setting.image_size, setting.image_size, device=setting.device)
    expected = bench_infer.exact_logits(pair[0], images)
    began = time.monotonic()
    fast = fuse(pair[0], dtype=bench_infer.PRECISIONS[setting.precision], device=setting.device)
    ready = images.to(fast.dtype, memory_format=torch.channels_last)
    ours = Contender("visformer fused", setting.precision, "channels_last", lambda: fast(ready))
    differences = {ours.name: bench_infer.difference(ours, expected)}
    tuning_s = time.monotonic() - began
    entrants, left_out = [ours], {}
    for peer_name, make in _peers(setting, name, pair, images).items():
        try:
            peer = make()
            differences[peer_name] = bench_infer.difference(peer, expected, _PEER_LIMIT)
            entrants.append(peer)
        except Exception as error:  # a peer that does not run here must not cost us the others
            left_out[peer_name] = _line(error)
    timed = in_turns(entrants, setting.device, warmup=0, repeats=setting.rounds, turn_s=TURN_S)
    records = [summarize(one, timed[min(1, len(timed) - 1)], batch_size) for one in timed]  # x the first peer
    limit = bench_infer.against_roofline(pair[0], records, batch_size, setting.device)
    peak = roofline.Peak(*(limit["roofline"][setting.precision][key] for key in roofline.Peak._fields))
    return {
        "model": name,
        "batch_size": batch_size,
        "contenders": records,
        "logit_differences": differences,
        "left_out": left_out,
        "prepared": prepared,
        "tuning_s": round(tuning_s, 1),
        **limit,
        "layers": layer_times(fast, roofline.costs(pair[0], batch_size, fast.dtype), peak),
    }


@functools.cache
def _models(name: str, image_size: int) -> tuple[Any, nn.Module | None]:
    """Our model and timm's, where it has one, with equal weights and statistics that keep activations in bounds."""
    torch.manual_seed(0)
    if name in TIMMS:
        pair = bench_timm.build_pair(name, image_size)
        return pair.ours.eval(), pair.theirs.eval()
    model = create_model(name, image_size=image_size)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the next batch
    with torch.no_grad():
        model.train()(torch.randn(4, 3, image_size, image_size))
    return model.eval(), None


def _peers(setting: Setting, name: str, pair: Any, images: Tensor) -> dict[str, Callable[[], Contender]]:
    """Whom our model is held against, each built when called: timm's in the same precision and memory format, or ours
    without fusing where timm has none."""
    whose, source = ("timm", pair[1]) if name in TIMMS else ("visformer", pair[0])
    dtype = bench_infer.PRECISIONS[setting.precision]
    model: Any = copy.deepcopy(source).eval().to(setting.device, dtype)
    model = model.to(memory_format=torch.channels_last)
    ready = images.to(dtype, memory_format=torch.channels_last)

    def contender(title: str, run: Callable[[], Callable[[], Tensor]]) -> dict[str, Callable[[], Contender]]:
        return {title: lambda: Contender(title, setting.precision, "channels_last", run())}

    found = contender(f"{whose} eager", lambda: bench_infer.inferring(model, ready))
    if setting.device.type == "cuda":
        found |= contender(f"{whose} in a CUDA graph", lambda: bench_infer.recorded(model, ready))
        mode = "default" if len(images) > 1 else "reduce-overhead"  # a small batch is a matter of launches
        compiled = torch.compile(model, mode=mode, dynamic=False)
        found |= contender(f"{whose} compiled, {mode}", lambda: bench_infer.inferring(compiled, ready))
    return found


def max_autotune(setting: Setting, name: str, batch_size: int) -> dict[str, Any]:
    """timm's model by torch.compile's longest search, beside ours fused."""
    ours, theirs = _models(name, setting.image_size)
    assert theirs is not None
    images = torch.randn(batch_size, 3, setting.image_size, setting.image_size, device=setting.device)
    found = [
        bench_infer.fused(ours, images, setting.precision),
        *bench_infer.peers(theirs, images, modes=("max-autotune",)),
    ]
    expected = bench_infer.exact_logits(ours, images)
    differences = {one.name: bench_infer.difference(one, expected, _PEER_LIMIT) for one in found}
    timed = in_turns(found, setting.device, warmup=0, repeats=setting.rounds, turn_s=TURN_S)
    return {
        "model": name,
        "batch_size": batch_size,
        "contenders": [summarize(one, timed[1], batch_size) for one in timed],
        "logit_differences": differences,
    }


def layer_times(fast: nn.Module, layers: list[roofline.Layer], peak: roofline.Peak) -> list[dict[str, Any]]:
    """Each different layer as it was tuned: how often it occurs, microseconds of the library's way, of the best kernel
    of ours and of the one chosen, and of the roofline; None for what was not measured."""
    operation = next(module for module in fast.modules() if isinstance(module, Operation))
    tuned = operation._tuner._remembered()
    found = []
    for name in dict.fromkeys(layer.name for layer in layers):
        same = [layer for layer in layers if layer.name == name]
        entry = tuned.get(name, {})
        times = entry.get("microseconds", {})
        ours = [value for way, value in times.items() if way.startswith("kernel")]
        found.append(
            {
                "layer": name,
                "count": len(same),
                "chosen": entry.get("choice"),
                "library_us": next(iter(times.values()), None) if "library" not in times else times["library"],
                "kernel_us": min(ours, default=None),
                "chosen_us": times.get(entry.get("choice")),
                "roofline_us": round(1e6 * roofline.layer_bound(same[0].cost, peak), 2),
            }
        )
    return found


# ---- training, memory, tests


def train(setting: Setting, name: str, batch_size: int) -> dict[str, Any]:
    """The training step as `visformer bench --what train` measures it."""
    options = BenchOptions(
        what="train",
        models=[name],
        batch_sizes=[batch_size],
        image_size=setting.image_size,
        repeats=2 if setting.quick else 20,
        warmup=0 if setting.quick else 5,
        compile=not setting.quick,
        device_target="cpu" if setting.device.type == "cpu" else "cuda",
    )
    document = bench(options)
    return document["results"][0]


def memory(setting: Setting, name: str, batch_size: int) -> dict[str, Any]:
    """MiB that a batch takes at most: on CUDA what torch has allocated on the device, else resident memory."""
    shared = {
        "model": name,
        "image_size": setting.image_size,
        "batch_size": batch_size,
        "device": setting.device.type,
        "precision": setting.precision,
    }
    kinds = (*(("timm",) if name in TIMMS else ()), "visformer fused")
    found = {kind: bench_infer.memory_of({"kind": kind, **shared}) for kind in kinds}
    return {"model": name, "batch_size": batch_size, "peak_memory_mib": found}


def tests(paths: list[str], timeout_s: float) -> dict[str, Any]:
    """pytest over `paths`: its last line, and what failed; cut off after `timeout_s`."""
    if importlib.util.find_spec("pytest") is None:
        raise RunError("pytest is not installed here")
    several = ["-n", "8"] if importlib.util.find_spec("xdist") and len(os.sched_getaffinity(0)) >= 8 else []
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *several, *paths]
    began = time.monotonic()
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            output += f"\ncut off after {timeout_s:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    return {
        "paths": paths,
        "exit_code": process.returncode,
        "summary": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40],
        "tail": [] if process.returncode == 0 else lines[-60:],
        "seconds": round(time.monotonic() - began, 1),
    }


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
