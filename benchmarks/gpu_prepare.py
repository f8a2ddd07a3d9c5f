"""Compile what a fused network may choose from, on all cores, before it is tuned.

    python benchmarks/gpu_prepare.py visformer_tiny 256 224 bf16 --part 0 --parts 8

Tuning tries some 250 ways to compute the 20 different layers of a network, and compiling each takes seconds of one
core. Several of these processes share them out (`--part` of `--parts`) and leave what they compiled in the caches of
Triton and of torch.compile, where the process that tunes finds it. A way that can't be compiled here is passed over:
tuning says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def prepare(
    model: str, batch_size: int, image_size: int, precision: str, *, most: int, timeout_s: float
) -> dict[str, Any]:
    """Run as many processes as there are cores but one, at most 16 and `most`; returns how many, how many of them
    came to their end, and the seconds they took."""
    count = max(1, min(16, most, len(os.sched_getaffinity(0)) - 1))
    words = [sys.executable, __file__, model, str(batch_size), str(image_size), precision, "--parts", str(count)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    began = time.monotonic()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*words, "--part", str(part)], env=environment, **silent) for part in range(count)]
    try:
        for process in running:
            process.wait(timeout=max(1.0, timeout_s - (time.monotonic() - began)))
    except subprocess.TimeoutExpired:
        pass  # what is not compiled yet will be when it is tuned
    finally:
        finished = sum(process.poll() == 0 for process in running)
        for process in running:
            process.kill()
            process.wait()
    return {"processes": count, "finished": finished, "seconds": round(time.monotonic() - began, 1)}


def ways(model: str, batch_size: int, image_size: int, precision: str, device: str) -> Iterator[tuple[str, Any, Any]]:
    """(name, builder, inputs) of each way to compute each different layer, in the order in which they are tuned."""
    import torch

    from visformer.fusion.fused import fuse
    from visformer.fusion.operation import Operation
    from visformer.models import create_model
    from visformer.verbs.bench_infer import PRECISIONS

    dtype = PRECISIONS[precision]
    network = create_model(model, image_size=image_size).eval()
    fused = fuse(network, dtype=dtype, device=device, choose="library", cuda_graphs=False)
    seen: dict[str, tuple[Operation, list[Any]]] = {}
    run = Operation.forward

    def remembering(self, *inputs):
        shapes = [None if value is None else (value.shape, value.dtype) for value in inputs]
        seen.setdefault(self.signature(*inputs), (self, shapes))
        return run(self, *inputs)

    Operation.forward = remembering  # type: ignore[method-assign]
    try:
        fused(torch.randn(batch_size, 3, image_size, image_size))
    finally:
        Operation.forward = run  # type: ignore[method-assign]
    for signature, (operation, shapes) in seen.items():
        inputs = [None if shape is None else _random(*shape, device=device) for shape in shapes]
        for name, build in operation.candidates(*inputs).items():
            yield f"{signature}: {name}", build, inputs


def _random(shape, dtype, device: str):
    import torch

    values = torch.randn(shape, device=device).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def main() -> int:
    """Build and run once each way of this part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("image_size", type=int)
    parser.add_argument("precision")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src")]
    sys.path.append(str(ROOT / "benchmarks" / "stand_ins"))
    import torch

    described = (options.model, options.batch_size, options.image_size, options.precision, options.device)
    with torch.inference_mode():
        for number, (name, build, inputs) in enumerate(ways(*described)):
            if number % options.parts != options.part:
                continue
            try:
                build()(*inputs)
                print(f"{name}: compiled")
            except Exception as error:  # a tile that does not fit the device: tuning leaves it out with a warning
                print(f"{name}: {type(error).__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
