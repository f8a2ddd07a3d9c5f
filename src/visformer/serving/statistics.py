"""Counts and times of one model since it was loaded, as the protocol's statistics extension wants them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds

    def to_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": round(self.seconds * 1e9)}


STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Statistics:
    """`requests` has a duration for each of STAGES; those of a batch are added by `batch`."""

    requests: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in STAGES})
    batches: dict[int, Duration] = field(default_factory=dict)
    images: int = 0
    last_ms: int = 0  # milliseconds since 1970

    def success(self, images: int, seconds: dict[str, float]) -> None:
        """One request answered; `seconds` by stage, `success` being the whole."""
        for name, value in seconds.items():
            self.requests[name].add(value)
        self.images += images
        self.last_ms = time.time_ns() // 1_000_000

    def fail(self, seconds: float) -> None:
        """One request that was refused, or given up."""
        self.requests["fail"].add(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """One batch computed."""
        self.batches.setdefault(size, Duration()).add(seconds)

    def to_dict(self, name: str, version: str) -> dict[str, Any]:
        """One element of the protocol's `model_stats`. The response cache that it knows of there is none of."""
        nothing = Duration().to_dict()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.images,
            "execution_count": sum(batch.count for batch in self.batches.values()),
            "inference_stats": {
                **{stage: self.requests[stage].to_dict() for stage in STAGES},
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": nothing,
                    "compute_infer": duration.to_dict(),
                    "compute_output": nothing,
                }
                for size, duration in sorted(self.batches.items())
            ],
        }
