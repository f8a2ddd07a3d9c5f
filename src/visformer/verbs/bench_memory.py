"""A process that infers one batch and says how much memory it had at most: `python -m visformer.verbs.bench_memory`.

Its one argument is a JSON object: kind (timm, visformer fused, bundle), model (a name, or a bundle's folder),
image_size and batch_size; of models also, where they differ from the CPU and fp32, device (cpu, cuda) and precision
(fp32, bf16). It prints MiB: of resident memory, on CUDA of what torch had allocated on the device.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np


def infer(task: dict[str, Any]) -> None:
    """Load what `task` names and infer a batch of noise, twice."""
    side = task["image_size"]
    images = np.random.default_rng(0).standard_normal((task["batch_size"], 3, side, side), dtype=np.float32)
    if task["kind"] == "bundle":
        from visformer.bundles.bundle import Bundle

        engine = Bundle.open(task["model"]).engine()
        for _ in range(2):
            engine.run(images)
        return
    import torch

    device = torch.device(task.get("device", "cpu"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task.get("precision", "fp32")]
    if task["kind"] == "timm":
        import timm

        model = timm.create_model(task["model"], img_size=side).eval().to(device, dtype)
        if device.type != "cpu":
            model = model.to(memory_format=torch.channels_last)
    else:
        from visformer.fusion.fused import fuse
        from visformer.models import create_model

        model = fuse(create_model(task["model"], image_size=side).eval(), dtype=dtype, device=device)
    batch = torch.from_numpy(images).to(device, dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(2):
            model(batch)


def peak_on(device: str) -> float:
    """The most memory of this process so far, MiB: resident, on CUDA allocated on the device."""
    if device != "cuda":
        return peak_mib()
    import torch

    return torch.cuda.max_memory_allocated() / (1 << 20)


def peak_mib() -> float:
    """The most resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the parent's on Linux
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    infer(asked)
    print(peak_on(asked.get("device", "cpu")))
