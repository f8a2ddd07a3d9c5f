"""Timing several contenders side by side, in one process and turn by turn.

A machine's speed drifts: other work, heat, clocks. So the contenders take turns, each round begins with another of
them, and a ratio compares the two turns of the same round. Medians and quartiles tell what is typical and
how far it spreads.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visformer import console
from visformer.distributed import wait

TURN_S = 0.05  # of short steps


@dataclass(frozen=True)
class Contender:
    """One way of doing the work. `step` does it once and returns a tensor that must be finite at the end."""

    name: str
    precision: str
    memory_format: str
    step: Callable[[], Tensor]


@dataclass(frozen=True)
class Timed:
    """Seconds of a step of a contender, round by round, and whether its last result was finite."""

    contender: Contender
    seconds: list[float]
    finite: bool


def take_turns(
    contenders: list[Contender], device: torch.device, *, warmup: int, repeats: int, title: str, turn_s: float = 0.0
) -> list[Timed]:
    """`in_turns`; a terminal shows progress on stderr under `title`."""
    with console.progress() as bar:
        task = bar.add_task(title, total=warmup + repeats, status="rounds")
        done = functools.partial(bar.advance, task)
        return in_turns(contenders, device, warmup=warmup, repeats=repeats, turn_s=turn_s, on_round=done)


def in_turns(
    contenders: list[Contender],
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    turn_s: float,
    on_round: Callable[[], None] = lambda: None,
) -> list[Timed]:
    """Run `warmup` rounds that do not count, then `repeats` that do; one turn of each contender a round.

    A turn is one step, or as many of them, one right after the other, as take `turn_s` seconds (500 at most). Before
    several comes one more that does not count: the threads of the contender before, which look for work a while longer,
    have gone to sleep by then, and its own are awake.
    """
    count = len(contenders)
    steps = [max(1, min(500, round(turn_s / _turn(one, 2, device)[0]))) if turn_s else 1 for one in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    results = [torch.zeros(())] * count
    for number in range(warmup + repeats):
        for i in (*range(number % count, count), *range(number % count)):
            taken, results[i] = _turn(contenders[i], steps[i], device)
            if number >= warmup:
                seconds[i].append(taken)
        on_round()
    finite = [bool(result.isfinite().all()) for result in results]
    return [Timed(*row) for row in zip(contenders, seconds, finite, strict=True)]


def _turn(contender: Contender, steps: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a step, the mean of `steps`; and the last one's result."""
    if steps > 1:
        contender.step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps - 1):
        contender.step()
    result = contender.step()
    wait(device)
    return (time.perf_counter() - began) / steps, result


def summarize(timed: Timed, baseline: Timed, images: int) -> dict[str, Any]:
    """A contender's record; `images` are those of one step.

    images_per_s and ratio (speed over the baseline's in the same round) are medians, each with [first, third quartile].
    """
    rates = [images / seconds for seconds in timed.seconds]
    ratios = [theirs / ours for theirs, ours in zip(baseline.seconds, timed.seconds, strict=True)]
    return {
        "name": timed.contender.name,
        "precision": timed.contender.precision,
        "memory_format": timed.contender.memory_format,
        "images_per_s": statistics.median(rates),
        "images_per_s_quartiles": _quartiles(rates),
        "seconds_per_step": statistics.median(timed.seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": _quartiles(ratios),
        "finite": timed.finite,
    }


def cells(record: dict[str, Any], decimals: int = 0) -> list[str]:
    """A contender's record in a table: images/s, quartiles, ratio, quartiles."""
    rate, ratio = f"{{:,.{decimals}f}}", "{:.2f}"
    return [
        rate.format(record["images_per_s"]),
        f"{rate} to {rate}".format(*record["images_per_s_quartiles"]),
        ratio.format(record["ratio"]),
        f"{ratio} to {ratio}".format(*record["ratio_quartiles"]),
    ]


def _quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
