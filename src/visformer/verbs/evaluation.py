"""One pass of a model over a labelled set: what `validate` prints and what `train` does after an epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from visformer import console
from visformer.metrics import Evaluation, Metrics
from visformer.processes import add_up, gather_objects


@dataclass(frozen=True)
class Measured:
    """The figures of a pass, the images left out as (name, reason), and the time it took, loading included."""

    metrics: Metrics
    skipped: list[tuple[str, str]]
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.metrics.num_images / max(self.seconds, 1e-9)


@torch.no_grad()
def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable[Any],
    device: torch.device,
    mapping: Sequence[int],
    *,
    num_classes: int,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    precision: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    title: str | None = None,
) -> Measured:
    """Run `model`, which is on `device` and in eval mode, over the batches of `make_eval_loader`.

    `mapping` gives for each class of the data its index among the model's `num_classes` (`class_mapping`).
    `normalize` turns uint8 (B, C, H, W) on the device into the model's input (`Preprocessing.normalize`), `precision`
    opens the autocast for a forward pass. Where several processes each have a share of the set, all get the figures of
    the whole. With a `title`, a terminal shows progress under it. Nothing waits for the
    device before the end. Raises `RunError` when no image could be read.
    """
    assert not getattr(model, "training", False), "evaluate needs the model in eval mode"
    evaluation = Evaluation(num_classes, device)
    class_index = torch.tensor(mapping, dtype=torch.int64, device=device)
    skipped: list[tuple[str, str]] = []
    started = time.perf_counter()
    for batch in _watched(loader, title):
        skipped.extend(batch.failures)
        if len(batch.targets) == 0:
            continue
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = batch.targets.to(device, non_blocking=True)
        inputs = normalize(images)
        with precision():
            logits = model(inputs)
        evaluation.update(logits, class_index[targets])
    add_up(*evaluation.state())
    skipped = [failure for failures in gather_objects(skipped) for failure in failures]
    metrics = evaluation.compute()
    return Measured(metrics, skipped, time.perf_counter() - started)


def _watched(loader: Iterable[Any], title: str | None) -> Iterable[Any]:
    """The loader's batches, with a bar that counts them when there is a title."""
    if title is None:
        yield from loader
        return
    with console.progress() as bar:
        task = bar.add_task(title, total=len(loader), status="batches")  # pyright: ignore[reportArgumentType]
        for batch in loader:
            yield batch
            bar.advance(task)
