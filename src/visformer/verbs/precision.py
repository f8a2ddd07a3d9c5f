"""`--amp_level auto`: fp32 or half precision, whichever this device trains faster in.

CPUs differ by a factor of two in either direction: those with AMX multiply bf16 several times as fast as fp32, others
have to convert it. So a few steps of each are taken on a copy of the model, with noise for images, turn by turn.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import yaml

from visformer import console
from visformer.config import TrainConfig
from visformer.distributed import autocast, wait
from visformer.fusion.training import accelerate
from visformer.models import Visformer
from visformer.processes import on_first

HALF_LEVEL = "O2"
_ROUNDS = 3
_GAIN = 1.05  # that half precision must bring, for what it rounds off
_PIXELS = 2**19  # of a batch on a CPU: enough to tell, and a second or so


def settle_precision(
    config: TrainConfig, model: Visformer, device: torch.device, state: Mapping[str, Any] | None
) -> TrainConfig:
    """`config` with an `amp_level` that is not auto: that of the run to resume (`state`), or what measures faster.

    The model stays as it is. Several processes take what the first one measured.
    """
    if config.amp_level != "auto":
        return config
    if state is not None:
        return config.change(amp_level=yaml.safe_load(state["config"])["amp_level"])
    seconds = on_first(partial(seconds_of_a_step, config, model, device))
    level = HALF_LEVEL if seconds[HALF_LEVEL] * _GAIN < seconds["O0"] else "O0"
    gain = seconds["O0"] / seconds[HALF_LEVEL]
    console.note(f"amp_level auto: {config.amp_dtype} is {gain:.2f} times as fast as fp32 here; taking {level}")
    return config.change(amp_level=level)


def seconds_of_a_step(config: TrainConfig, model: Visformer, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and a backward pass in O0 and in half precision, medians; on a CPU with at most 2**19 pixels
    a batch. The global random numbers stay where they are."""
    scratch = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if config.speed != "off":
        accelerate(scratch)
    height, width = config.image_size
    count = config.batch_size if device.type != "cpu" else min(config.batch_size, max(2, _PIXELS // (height * width)))
    images = torch.randn(count, config.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=torch.channels_last)

    def step(level: str) -> float:
        wait(device)
        began = time.perf_counter()
        with autocast(device, level, config.amp_dtype):
            logits = scratch(images)
        logits.float().logsumexp(1).mean().backward()
        wait(device)
        return time.perf_counter() - began

    taken: dict[str, list[float]] = {"O0": [], HALF_LEVEL: []}
    with torch.random.fork_rng(devices=None if device.type == "cuda" else []):
        for _ in range(_ROUNDS + 1):
            for level, seconds in taken.items():
                seconds.append(step(level))
    return {level: statistics.median(seconds[1:]) for level, seconds in taken.items()}  # the first warms up
