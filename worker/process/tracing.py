"""One OpenTelemetry span for each shard, where an exporter is configured; else OpenTelemetry is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.records import Claim
from nermill.worker.process import logs
from nermill.worker.tagging.pipeline import Annotated

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_provider: TracerProvider | None = None


def start_from(environ: Mapping[str, str], worker: str, device: str) -> None:
    """Exports spans over OTLP where OpenTelemetry's own variables name an endpoint.

    Args:
        environ: The environment.
        worker: Becomes ``service.instance.id``.
        device: Becomes ``nermill.device``.

    Raises:
        UsageError: an endpoint is set and OpenTelemetry is not installed.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise UsageError(f"{ENDPOINTS[1]} is set and {error.name} is missing: pip install nermill[otel]") from None
    start(BatchSpanProcessor(OTLPSpanExporter()), worker, device)


def start(processor: SpanProcessor, worker: str, device: str) -> None:
    """Passes spans to a processor from now on.

    Args:
        processor: Takes the spans.
        worker, device: Attributes of every span; see ``start_from``.
    """
    global _provider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    about = {"service.name": "nermill-worker", "service.instance.id": worker, "nermill.device": device}
    _provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    _provider.add_span_processor(processor)


def stop() -> None:
    """Exports the spans that are left; there are none afterwards."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
    _provider = None


@contextmanager
def shard(claim: Claim) -> Iterator[None]:
    """Makes the ``with`` block the span ``nermill.shard``; log records inside have its trace id as ``trace``."""
    if _provider is None:
        yield
        return
    facts = {"run": claim.run_id, "shard": claim.key, "attempt": claim.attempts}
    attributes = {f"nermill.{name}": value for name, value in facts.items()}
    tracer = _provider.get_tracer("nermill")
    with (
        tracer.start_as_current_span("nermill.shard", attributes=attributes) as span,
        logs.about(trace=f"{span.get_span_context().trace_id:032x}"),
    ):
        yield


def committed(annotated: Annotated) -> None:
    """Adds the counts and the measurements of a committed shard to the current span."""
    if _provider is None:
        return
    from opentelemetry.trace import get_current_span

    facts = {"documents": annotated.part.num_rows, "rejected": len(annotated.faults), **asdict(annotated.stats)}
    get_current_span().set_attributes({f"nermill.{name}": value for name, value in facts.items()})
