"""Forward passes: our model fused and exported for each engine, beside timm's, in one run.

The engines run bundles as `visformer export --input tensor` writes them, int8 calibrated on images of noise like those
of the run. Each contender's logits are held against our model's in float64 before it is timed, and its speed against
the roofline of the fused network in its precision.

Memory is that of a process which does nothing else: the most it had in RAM until it had inferred.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visformer.bundles.build import Request, build
from visformer.bundles.bundle import Bundle
from visformer.bundles.needs import INSTALL, missing
from visformer.checkpoint import Checkpoint, write_checkpoint
from visformer.data.preprocessing import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.fusion import roofline
from visformer.fusion.fused import fuse, record_graph
from visformer.models import Visformer
from visformer.pretrained import load
from visformer.verbs.bench_timing import Contender

ENGINES = {"onnxruntime": ("onnx", ("fp32", "int8")), "openvino": ("openvino", ("fp32", "bf16", "int8"))}
CALIBRATION = 32  # images
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED = 8  # images of a batch whose logits are compared
_LIMITS = {"fp32": 1e-3, "bf16": 1e-1, "int8": 7e-1}  # what has nothing to do with the model is off by 1.4
_TF32_LIMIT = 1e-2  # of fp32 where the library's convolutions round their inputs to TF32


def check_engines(against: list[str]) -> None:
    """Raise `UsageError` unless the engines and what exports for them are there."""
    for engine in set(against) & set(ENGINES):
        package = missing(ENGINES[engine][0], "int8")
        if package:
            raise UsageError(f"against: {engine} needs {package}, which is not there: {INSTALL}")


def entrants(name: str, pair: Any, images: Tensor, options: Any) -> tuple[list[Contender], dict[str, Any]]:
    """The contenders of `visformer bench` that only infer, with the weights of `pair`; and for the result,
    `logit_differences` of each from the model, and `peak_memory_mib` of processes that infer such a batch."""
    theirs = pair.theirs if options.compile else None
    with tempfile.TemporaryDirectory(prefix="visformer-bench-") as place:
        folder = Path(place)
        found, differences = contenders(name, pair.ours, images, options.against, folder, theirs=theirs)
        extra: dict[str, Any] = {"logit_differences": differences}
        if images.device.type in ("cpu", "cuda"):
            size = (images.shape[-1], len(images))
            extra["peak_memory_mib"] = peak_memory(name, *size, options.against, folder, images.device.type)
    return found, extra


def contenders(
    name: str, model: Visformer, images: Tensor, against: list[str], folder: Path, *, theirs: nn.Module | None = None
) -> tuple[list[Contender], dict[str, float]]:
    """Ours fused, in fp32 and bf16, and a bundle for each engine and precision, all with the weights of `model`; and
    each one's largest logit difference from `model`, in units of the largest logit.

    `images` are normalised (B, C, H, W) on the device; bundles run on the CPU. `theirs` is timm's model with the same
    weights, where it is to be compiled too (see `peers`). `folder` keeps the bundles. Raises `RunError` for logits that
    differ.
    """
    found = [fused(model, images, precision) for precision in PRECISIONS]
    if theirs is not None:
        found += peers(theirs, images)
    if images.device.type == "cpu":
        array = images.contiguous().numpy()
        found += [
            _exported(bundle(name, model, engine, precision, folder), array)
            for engine in ENGINES
            if engine in against
            for precision in ENGINES[engine][1]
        ]
    expected = exact_logits(model, images)
    return found, {c.name + " " + c.precision: difference(c, expected) for c in found}


def fused(model: Visformer, images: Tensor, precision: str) -> Contender:
    """`model` fused, on `images` in that precision already."""
    fast = fuse(model, dtype=PRECISIONS[precision], device=images.device)
    ready = images.to(PRECISIONS[precision], memory_format=torch.channels_last)
    return Contender("visformer fused", precision, "channels_last", lambda: fast(ready))


def peers(theirs: nn.Module, images: Tensor, modes: tuple[str, ...] = ("default", "max-autotune")) -> list[Contender]:
    """timm's model made fast by torch's own means: compiled, on CUDA in bf16 and channels_last by each of `modes`, and
    eager in a CUDA graph. On a CPU in fp32, compiled by the default mode."""
    if images.device.type != "cuda":
        model = torch.compile(copy.deepcopy(theirs).to(images.device).eval())
        return [Contender("timm compiled", "fp32", "contiguous", inferring(model, images.contiguous()))]
    ready = images.to(torch.bfloat16, memory_format=torch.channels_last)
    plain: Any = copy.deepcopy(theirs).eval().to(images.device, torch.bfloat16)
    plain = plain.to(memory_format=torch.channels_last)
    found = [Contender("timm in a CUDA graph", "bf16", "channels_last", recorded(plain, ready))]
    for mode in modes:
        model = torch.compile(plain, mode=mode, dynamic=False)
        name = "timm compiled" + ("" if mode == "default" else f", {mode}")
        found.append(Contender(name, "bf16", "channels_last", inferring(model, ready)))
    return found


def inferring(model: Any, images: Tensor) -> Callable[[], Tensor]:
    """A pass whose logits are a copy, since a graph's own are overwritten by its next pass."""

    @torch.no_grad()
    def step() -> Tensor:
        return model(images).clone()

    return step


@torch.no_grad()
def recorded(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A pass of `model` as one CUDA graph, the images' copying in and the logits' copying out included."""
    graph, inputs, logits = record_graph(model, images)

    def step() -> Tensor:
        inputs.copy_(images)
        graph.replay()
        return logits.clone()

    return step


def _exported(opened: Bundle, array: np.ndarray) -> Contender:
    engine = opened.engine()
    name = f"visformer, {opened.engine_name}"
    return Contender(name, opened.precision, "channels_last", lambda: torch.from_numpy(engine.run(array)))


def exact_logits(model: Visformer, images: Tensor) -> Tensor:
    """Logits of the first images of a batch in float64, on the CPU: (at most `CHECKED`, classes)."""
    with torch.inference_mode():
        return copy.deepcopy(model).to(images.device).double().eval()(images[:CHECKED].double()).cpu()


def difference(contender: Contender, expected: Tensor, limit: float | None = None) -> float:
    """How far a contender's logits are from those expected of the first images, in units of the largest; in int8, where
    single logits of random weights say little, the root mean square of it in units of theirs. Raises `RunError` when
    that is further than `limit`, None: than its precision allows."""
    with torch.no_grad():  # and not the inference mode, for which torch.compile would compile once more
        logits = contender.step()[: len(expected)].double().cpu()
    order = 2.0 if contender.precision == "int8" else float("inf")
    norms = [torch.linalg.vector_norm(values, order) for values in (logits - expected, expected)]
    off_by = float(norms[0] / norms[1])
    limit = limit or _LIMITS[contender.precision]
    if contender.precision == "fp32" and torch.cuda.is_available() and torch.backends.cudnn.allow_tf32:
        limit = _TF32_LIMIT
    if not off_by <= limit:
        raise RunError(
            f"{contender.name} in {contender.precision}: its logits differ by {off_by:.1e} of their size, where "
            f"at most {limit:.0e} is allowed; nothing was timed"
        )
    return off_by


def against_roofline(
    model: Visformer, records: list[dict[str, Any]], batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Give each of `records` its `roofline_share`: the least time of a batch, by the roofline in its precision, over
    the time it took; None for int8, whose peak is not measured.

    Returns what the shares are of, for each precision: flops_per_s and bytes_per_s as the device showed them just now,
    the batch's flops and bytes, seconds_per_step and images_per_s of the roofline; and the device's clocks.
    """
    found: dict[str, dict[str, float]] = {}
    for precision in sorted({record["precision"] for record in records} & set(PRECISIONS)):
        peak = roofline.measure(device, PRECISIONS[precision])
        layers = roofline.costs(model, batch_size, PRECISIONS[precision])
        seconds = roofline.bound(layers, peak)
        found[precision] = {
            **peak._asdict(),
            "flops": sum(layer.cost.flops for layer in layers),
            "bytes": sum(layer.cost.bytes for layer in layers),
            "seconds_per_step": seconds,
            "images_per_s": batch_size / seconds,
        }
    for record in records:
        limit = found.get(record["precision"])
        record["roofline_share"] = None if limit is None else limit["seconds_per_step"] / record["seconds_per_step"]
    return {"roofline": found, "clocks": roofline.clocks(device)}


def bundle(name: str, model: Visformer, engine: str, precision: str, folder: Path) -> Bundle:
    """A bundle of preprocessed batches of `model`, the one called `name`; one that is there already is used again."""
    place = folder / f"{engine}-{precision}"
    if place.exists():
        return Bundle.open(place)
    checkpoint = folder / "model.safetensors"
    loaded = load(checkpoint) if checkpoint.exists() else exportable(name, model, checkpoint)
    generator = np.random.default_rng(0)
    shape = (*model.config.image_size, 3)
    noise = [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(CALIBRATION)]
    pictures = [lambda picture=picture: picture for picture in noise] if precision == "int8" else []
    return build(loaded, Request(ENGINES[engine][0], precision, "tensor", calibration=pictures), place)


def exportable(name: str, model: Visformer, path: Path) -> Visformer:
    """`model`, the one called `name`, written to `path` as a checkpoint whose classes are numbers, and read from it."""
    labels = [f"class {number}" for number in range(model.num_classes)]
    preprocessing = Preprocessing(model.config.image_size)
    write_checkpoint(path, Checkpoint(name, model.config, labels, preprocessing, model.cpu().state_dict()))
    return load(path)


def peak_memory(
    model: str, image_size: int, batch_size: int, against: list[str], folder: Path, device: str = "cpu"
) -> dict[str, float]:
    """MiB of memory that a process needs at most to infer a batch: with timm's model, with ours fused, and with a
    bundle of each engine in int8. On `cuda`: of the device, in bf16, and of the models alone."""
    tasks = {name: {"kind": name, "model": model} for name in ("timm", "visformer fused")}
    for engine in ENGINES:
        if engine in against and device == "cpu":
            tasks[f"visformer, {engine} int8"] = {"kind": "bundle", "model": str(folder / f"{engine}-int8")}
    shared = {"image_size": image_size, "batch_size": batch_size, "device": device}
    shared |= {"precision": "fp32" if device == "cpu" else "bf16"}
    return {name: memory_of(task | shared) for name, task in tasks.items()}


def memory_of(task: dict[str, Any]) -> float:
    """MiB of a process of `bench_memory.py` that is given this task. Raises `RunError` when it fails."""
    command = [sys.executable, "-m", "visformer.verbs.bench_memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"memory of {task['kind']}: {lines[-1]}")
    return float(done.stdout)
