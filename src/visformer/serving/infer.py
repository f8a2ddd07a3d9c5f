"""An infer request, computed and written: what REST and gRPC both do with one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from visformer.serving.door import Call
from visformer.serving.model import ServedModel
from visformer.serving.refusals import Refusal
from visformer.serving.request import InferRequest, Output, outputs

if TYPE_CHECKING:
    from visformer.serving.app import Service

T = TypeVar("T")
WRITTEN_AT_ONCE = 20_000  # numbers, a few milliseconds; larger answers are written in a thread


async def answer(
    service: Service, call: Call, model: ServedModel, asked: InferRequest, write: Callable[[list[Output]], T]
) -> T:
    """What `write` makes of the outputs that were asked for. Raises `Refusal`."""
    if asked.timeout_s is not None:
        call.shorten(asked.timeout_s)
    if asked.tensor is not None:
        results = list(await service.inference.tensor(call, model, asked.tensor))
    else:
        computed = await service.inference.images(call, model, asked.images or [])
        results = [one if isinstance(one, Refusal) else one.logits for one in computed]

    def finish() -> T:
        return write(outputs(model, results, asked.wanted, service.settings.top_k))

    started = time.perf_counter()
    small = len(results) * len(model.labels) <= WRITTEN_AT_ONCE
    made = finish() if small else await service.decoder.call(finish)
    call.stages["output"] = time.perf_counter() - started
    return made
