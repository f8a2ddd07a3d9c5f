"""When a run ends early (`--early_stop_epochs`): after so many epochs without a better result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from visformer.metrics import Metrics


@dataclass
class Patience:
    """Counts epochs with neither a higher top-1 nor a lower validation loss than any before; `limit` None: for ever."""

    limit: int | None
    top1: float = -math.inf
    loss: float = math.inf
    epochs: int = 0  # since the last better one

    def count(self, metrics: Metrics | None, epochs: int = 1) -> None:
        """Take note of a validation, which came `epochs` after the one before; None: there was none."""
        if metrics is None:
            return
        better = metrics.top1 > self.top1 or metrics.loss < self.loss
        self.epochs = 0 if better else self.epochs + epochs
        self.top1, self.loss = max(self.top1, metrics.top1), min(self.loss, metrics.loss)

    @property
    def is_over(self) -> bool:
        """True when it is time to end the run."""
        return self.limit is not None and self.epochs >= self.limit
