"""What Prometheus reads at `/metrics`.

Each server has a registry of its own. Replicas share a folder of files (prometheus_client's multiprocess mode), so that
any of them answers for all; gauges are then added up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from visformer.serving.door import Call
from visformer.serving.refusals import CLIENT_GONE

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_REJECTED = {401: "key", 403: "origin", 408: "slow", 413: "size", 503: "busy", CLIENT_GONE: "gone"}


class Metrics:
    """Counters and histograms, all beginning with `visformer_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "visformer_requests_total", "Requests answered", ["endpoint", "model", "version", "status"], **made
        )
        self._rejected = Counter("visformer_rejected_total", "Requests not served, by reason", ["reason"], **made)
        self._seconds = Histogram(
            "visformer_request_seconds",
            "Time of a request by stage: read, decode, queue, compute, and total",
            ["stage"],
            buckets=_SECONDS,
            **made,
        )
        self._images = Counter("visformer_images_total", "Images labelled", ["model", "version"], **made)
        self._sizes = Histogram(
            "visformer_batch_size", "Images that were computed together", ["model", "version"], buckets=_SIZES, **made
        )
        self._compute = Histogram(
            "visformer_batch_seconds", "Time of one batch", ["model", "version"], buckets=_SECONDS, **made
        )
        made["multiprocess_mode"] = "livesum"
        self._in_flight = Gauge("visformer_requests_in_flight", "Requests being worked on", **made)
        self._waiting = Gauge("visformer_images_waiting", "Images that no batch has taken yet", **made)
        self._ready = Gauge("visformer_ready", "1 when the server is ready", **made)

    def request(self, call: Call, endpoint: str, status: int) -> None:
        """One request that is over; `endpoint` is a route's pattern, so that there are few."""
        self._requests.labels(endpoint, call.model, call.version, str(status)).inc()
        reason = _REJECTED.get(status)
        if reason and not endpoint.endswith("/ready"):
            self._rejected.labels(reason).inc()
        for stage, seconds in call.stages.items():
            self._seconds.labels(stage).observe(seconds)
        self._seconds.labels("total").observe(call.seconds)
        if call.images and status < 300:
            self._images.labels(call.model, call.version).inc(call.images)

    def batch(self, model: str, version: str, size: int, seconds: float) -> None:
        """One batch computed."""
        self._sizes.labels(model, version).observe(size)
        self._compute.labels(model, version).observe(seconds)

    def watch(self, in_flight: Callable[[], int], waiting: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Where the gauges come from; they are read when `text` is called."""
        self._gauges = (in_flight, waiting, ready)

    def refresh(self) -> None:
        """Set the gauges to what is so now."""
        for gauge, value in zip((self._in_flight, self._waiting, self._ready), self._gauges, strict=True):
            gauge.set(value())

    def text(self) -> bytes:
        """In Prometheus' text format."""
        self.refresh()
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)
        return generate_latest(shared)
