"""The parts of `gpu_suite.py`: what is measured, each as a function that returns a record for the document."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
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

from visformer.errors import RunError
from visformer.fusion import roofline
from visformer.fusion.fused import fuse
from visformer.fusion.operation import Operation
from visformer.fusion.tuner import FP8
from visformer.models import Visformer, create_model
from visformer.verbs import bench_infer, bench_timm
from visformer.verbs.bench import BenchOptions, bench
from visformer.verbs.bench_timing import TURN_S, Contender, in_turns, summarize

ROOT = Path(__file__).resolve().parents[1]
TIMMS = ("visformer_tiny", "visformer_small")  # that timm has too
_PROCESS_BYTES = 6 << 30  # of the device's memory, for each process that compiles
_FEW = 3  # turns of a record that is not finished
_FP8_LIMIT = 0.7  # likewise; what has nothing to do with the model is off by 1.4
_PEER_LIMIT = 0.3  # of the largest logit: a peer is the same function, as exact as it may be


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


# ---- the kernels, and inference


def check_kernels(setting: Setting) -> dict[str, Any]:
    """`gpu_checks.check_kernels` in a process of its own, since a kernel that is wrong may end the use of the device.

    Raises `RunError` with what it said.
    """
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py"), "--device", setting.device.type]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(lines[-1])
    return json.loads(done.stdout)


def infer(
    setting: Setting, name: str, batch_size: int, timeout_s: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A model fused and tuned beside its peers: images a second, shares of the roofline, and each layer's times.

    `timeout_s` is for compiling ahead. `keep` gets the record as it is after tuning and after each peer, timed in few
    turns, in case that the time is up before the end.
    """
    pair = _models(name, setting.image_size)
    record: dict[str, Any] = {"model": name, "batch_size": batch_size, "prepared": None}
    if setting.device.type == "cuda":
        most = torch.cuda.get_device_properties(setting.device).total_memory // _PROCESS_BYTES
        described = (name, batch_size, setting.image_size, setting.precision)
        record["prepared"] = gpu_prepare.prepare(*described, most=max(1, most), timeout_s=timeout_s)
    images = torch.randn(batch_size, 3, setting.image_size, setting.image_size, device=setting.device)
    expected = bench_infer.exact_logits(pair[0], images)
    began = time.monotonic()
    fast = fuse(pair[0], dtype=bench_infer.PRECISIONS[setting.precision], device=setting.device)
    ready = images.to(fast.dtype, memory_format=torch.channels_last)
    ours = Contender("visformer fused", setting.precision, "channels_last", lambda: fast(ready))
    record["logit_differences"] = {ours.name: bench_infer.difference(ours, expected)}
    record |= {"tuning_s": round(time.monotonic() - began, 1), "left_out": {}}
    entrants = [ours]
    timed = functools.partial(_timed, setting, pair[0], fast, batch_size, entrants)
    for peer_name, make in _peers(setting, name, pair, images).items():
        keep(record | timed(_FEW))
        try:
            peer = make()
            record["logit_differences"][peer_name] = bench_infer.difference(peer, expected, _PEER_LIMIT)
            entrants.append(peer)
        except Exception as error:  # a peer that does not run here must not cost us the others
            record["left_out"][peer_name] = _line(error)
    return record | timed(setting.rounds)


def _timed(
    setting: Setting, model: Visformer, fast: nn.Module, batch_size: int, entrants: list[Contender], rounds: int
) -> dict[str, Any]:
    """The contenders' records, the roofline and the layers' times; ratios are to the first peer, where there is one."""
    timed = in_turns(entrants, setting.device, warmup=0, repeats=rounds, turn_s=TURN_S)
    records = [summarize(one, timed[min(1, len(timed) - 1)], batch_size) for one in timed]
    limit = bench_infer.against_roofline(model, records, batch_size, setting.device)
    peak = roofline.Peak(*(limit["roofline"][setting.precision][key] for key in roofline.Peak._fields))
    layers = roofline.costs(model, batch_size, bench_infer.PRECISIONS[setting.precision])
    return {"contenders": records, **limit, "layers": layer_times(fast, layers, peak)}


@functools.cache
def _models(name: str, image_size: int) -> tuple[Any, nn.Module | None]:
    """Our model and timm's, where it has one, with equal weights and statistics that keep activations in bounds."""
    torch.manual_seed(0)
    if name in TIMMS:
        pair = bench_timm.build_pair(name, image_size)
        return pair.ours.eval(), pair.theirs.eval()
    model = create_model(name, image_size=image_size)
    bench_timm.settle(model, image_size)
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


def fp8(setting: Setting, name: str, batch_size: int) -> dict[str, Any]:
    """A model fused with its products in eight bits where that is faster, beside the same without."""
    model = _models(name, setting.image_size)[0]
    images = torch.randn(batch_size, 3, setting.image_size, setting.image_size, device=setting.device)
    expected = bench_infer.exact_logits(model, images)
    dtype = bench_infer.PRECISIONS[setting.precision]
    ready = images.to(dtype, memory_format=torch.channels_last)
    plain, eight = (fuse(model, dtype=dtype, device=setting.device, fp8=fp8) for fp8 in (False, True))
    found = [
        Contender("visformer fused, fp8", setting.precision, "channels_last", lambda: eight(ready)),
        Contender("visformer fused", setting.precision, "channels_last", lambda: plain(ready)),
    ]
    differences = {one.name: bench_infer.difference(one, expected, _FP8_LIMIT) for one in found}
    timed = in_turns(found, setting.device, warmup=0, repeats=setting.rounds, turn_s=TURN_S)
    return {
        "model": name,
        "batch_size": batch_size,
        "contenders": [summarize(one, timed[1], batch_size) for one in timed],
        "logit_differences": differences,
        "products": eight_bit_products(eight, batch_size),
    }


def eight_bit_products(fast: nn.Module, batch_size: int) -> list[dict[str, Any]]:
    """Each different product that was tried in eight bits: microseconds of the fastest other way and of the fastest in
    eight bits."""
    tuned = next(module for module in fast.modules() if isinstance(module, Operation))._tuner._remembered()
    found = []
    for name, entry in tuned.items():
        if name.startswith(f"linear {batch_size}x") and name.endswith(" fp8"):
            times = entry.get("microseconds", {})
            eight = [value for way, value in times.items() if way.startswith(FP8)]
            others = [value for way, value in times.items() if not way.startswith(FP8)]
            found.append({"layer": name, "other_us": min(others, default=None), "fp8_us": min(eight, default=None)})
    return found


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
