"""OpenTelemetry, when it is asked for: one span for each request, with its stages as attributes.

The exporter is OTLP over HTTP; where it sends to, and every other setting, is in OpenTelemetry's own environment
variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...). A caller's `traceparent` header is continued.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from visformer.errors import UsageError
from visformer.serving.door import Call


class Tracing:
    """Does nothing unless it is `on`. Raises `UsageError` when it is and the packages are missing."""

    def __init__(self, on: bool) -> None:
        self._tracer: Any = _tracer() if on else None

    @contextmanager
    def request(self, call: Call, name: str, headers: Mapping[str, str]) -> Iterator[None]:
        """A span around a request."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        carrier = {key.lower(): value for key, value in headers.items()}
        with self._tracer.start_as_current_span(name, context=extract(carrier), kind=SpanKind.SERVER) as span:
            span.set_attribute("request.id", call.request_id)
            try:
                yield
            finally:
                span.set_attributes({f"stage.{stage}_s": seconds for stage, seconds in call.stages.items()})
                span.set_attributes({"model.name": call.model, "model.version": call.version, "images": call.images})

    def close(self) -> None:
        """Send what has not been sent yet."""
        if self._tracer is not None:
            from opentelemetry import trace

            provider: Any = trace.get_tracer_provider()
            provider.shutdown()


def _tracer() -> Any:
    try:
        trace, exporter, resources, sdk, export = (
            importlib.import_module(f"opentelemetry.{name}")
            for name in (
                "trace",
                "exporter.otlp.proto.http.trace_exporter",
                "sdk.resources",
                "sdk.trace",
                "sdk.trace.export",
            )
        )
    except ImportError as error:
        raise UsageError(
            f"tracing: needs OpenTelemetry, which is not there ({error}): pip install 'visformer[otel]'"
        ) from None
    service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "visformer")}
    provider = sdk.TracerProvider(resource=resources.Resource.create(service))
    provider.add_span_processor(export.BatchSpanProcessor(exporter.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return trace.get_tracer("visformer.serving")
