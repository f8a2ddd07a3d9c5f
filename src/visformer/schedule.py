"""The learning rate of each optimizer step, equal to MindCV's step for step.

`learning_rates(config, steps_per_epoch)` gives a function from the number of a step (0 is the first) to its rate;
nothing is listed in advance, so a run of millions of steps costs nothing. Warm-up comes first, then the decay, which
counts epochs from the end of warm-up. one_cycle (Smith and Topin, arXiv 1708.07120, with the phases of torch's
OneCycleLR) and cyclic (Smith, arXiv 1506.01186) bring their own rise and stretch over the whole run, so they take no
warm-up. Nothing here imports torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from visformer.config import TrainConfig
from visformer.errors import UsageError

_ONE_CYCLE_RISE = 0.3  # share of the run in which one_cycle rises, and
_ONE_CYCLE_START = 25  # what its peak is divided by at the start: the defaults of torch and MindCV


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The function from an optimizer step's number, 0 or more, to its learning rate.

    `steps_per_epoch` counts optimizer steps, so batches divided by `gradient_accumulation_steps`. Steps beyond the last
    epoch go on by the same rule. Raises `UsageError` where the options contradict each other.
    """
    if config.scheduler in _WHOLE_RUN:
        if config.lr_epoch_stair:
            raise UsageError(
                f"lr_epoch_stair: {config.scheduler} changes the rate every step; set lr_epoch_stair to False"
            )
        return _WHOLE_RUN[config.scheduler](config, steps_per_epoch * config.epoch_size)

    decay = _DECAYS[config.scheduler](config)
    start = config.lr * config.warmup_factor

    def rate(step: int) -> float:
        epoch = step // steps_per_epoch if config.lr_epoch_stair else step / steps_per_epoch
        if epoch < config.warmup_epochs:
            return start + (config.lr - start) * epoch / config.warmup_epochs
        return decay(epoch - config.warmup_epochs)

    return rate


def _constant(config: TrainConfig) -> Callable[[float], float]:
    return lambda epoch: config.lr


def _cosine(config: TrainConfig) -> Callable[[float], float]:
    """`num_cycles` half cosines of `decay_epochs` each, from the peak to `min_lr`, then `min_lr`."""

    def rate(epoch: float) -> float:
        if epoch >= config.num_cycles * config.decay_epochs:
            return config.min_lr
        cycle, position = divmod(epoch, config.decay_epochs)
        peak = config.lr * config.cycle_decay**cycle
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * position / config.decay_epochs))

    return rate


def _exponential(config: TrainConfig) -> Callable[[float], float]:
    return lambda epoch: config.lr * config.decay_rate**epoch


def _step(config: TrainConfig) -> Callable[[float], float]:
    if config.decay_epochs < 1:
        raise UsageError(f"decay_epochs: {config.decay_epochs} leaves step_decay no step; it must be at least 1")
    return lambda epoch: config.lr * config.decay_rate ** (epoch // config.decay_epochs)


def _multi_step(config: TrainConfig) -> Callable[[float], float]:
    milestones = sorted(config.multi_step_decay_milestones)
    return lambda epoch: config.lr * config.decay_rate ** bisect_right(milestones, epoch)


def _one_cycle(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """A cosine from lr / 25 up to lr, then one down to `min_lr`, which the last step reaches."""
    top = max(_ONE_CYCLE_RISE * total_steps - 1, 0)
    fall = max(total_steps - 1 - top, 1)

    def rate(step: int) -> float:
        if step < top:
            start, end, position = config.lr / _ONE_CYCLE_START, config.lr, step / top
        else:
            start, end, position = config.lr, config.min_lr, min((step - top) / fall, 1)
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * position))

    return rate


def _cyclic(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """`num_cycles` triangles from `min_lr` up to lr and back."""
    half = total_steps / config.num_cycles / 2

    def rate(step: int) -> float:
        height = 1 - abs(step % (2 * half) / half - 1)
        return config.min_lr + (config.lr - config.min_lr) * height

    return rate


# epochs since the end of warm-up -> rate
_DECAYS: dict[str, Callable[[TrainConfig], Callable[[float], float]]] = {
    "constant": _constant,
    "cosine_decay": _cosine,
    "exponential_decay": _exponential,
    "step_decay": _step,
    "multi_step_decay": _multi_step,
}

# step of the whole run -> rate
_WHOLE_RUN: dict[str, Callable[[TrainConfig, int], Callable[[int], float]]] = {
    "one_cycle": _one_cycle,
    "cyclic": _cyclic,
}
