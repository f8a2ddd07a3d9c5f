"""The device and its precision.

Everything goes through `torch.accelerator`, so that CUDA, NPU, XPU and MPS are one case and the CPU the other.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata

import torch

from visformer.console import warn
from visformer.errors import UsageError
from visformer.processes import place

_DEVICE_TYPES = {"gpu": "cuda", "ascend": "npu"}  # MindCV's names
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str) -> torch.device:
    """The device that `name` means: auto, CPU, GPU, Ascend, or one of torch's own type names.

    MindCV's names (GPU, Ascend, CPU) are wishes, since its files carry them from another machine: one that is not here
    falls back to what is, with a warning. Torch's own names are demands, and a missing one is a `UsageError`.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    default = torch.device(found.type, place().local_rank) if found is not None else torch.device("cpu")
    if name == "auto":
        return default
    if found is not None and place().local_rank >= torch.accelerator.device_count():
        raise UsageError(
            f"process {place().local_rank + 1} of this machine has no device of its own: there are "
            f"{torch.accelerator.device_count()}; start as many processes, or use --device_target CPU"
        )
    wanted = _DEVICE_TYPES.get(name.lower(), name.lower())
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == default.type:
        return default
    if name in ("GPU", "Ascend"):
        warn(f"device_target: there is no {name} here; using {describe(default)}", once=True)
        return default
    raise UsageError(f"device_target: there is no {wanted} here; use auto, or {default.type}")


def describe(device: torch.device) -> str:
    """A device as a person names it, such as `cpu, 2 threads` or `cuda, NVIDIA H100`."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return device.type


def versions() -> dict[str, str]:
    """What a figure or a checkpoint depends on."""
    others = {name: metadata.version(name) for name in ("torchvision", "timm")}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **others}


def wait(device: torch.device) -> None:
    """Until the device has done all it was given; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def autocast(device: torch.device, amp_level: str, amp_dtype: str) -> AbstractContextManager:
    """Half precision for O1 to O3; nothing for O0."""
    if amp_level == "O0":
        return nullcontext()
    return torch.autocast(device.type, dtype=HALF[amp_dtype])
