"""Prometheus metrics of one worker process, and its health check."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.message import FINISH_RUN, TAG_DOCUMENTS, TAG_SHARD
from nermill.worker.engine import Batch, Engine
from nermill.worker.tagging.clock import DeviceClock
from nermill.worker.tagging.pipeline import Annotated, Pipeline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

STAGES = ("queue", "read", "tokenize", "wait", "compute", "decode", "write")
FILL_BUCKETS = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
SHARD_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
SLOW_CLIENT_SECONDS = 10.0  # a connection without a complete request is closed after that

TASKS = (TAG_SHARD, FINISH_RUN, TAG_DOCUMENTS)


class Metrics:
    """Counters and gauges of one process, in base units; no label's values depend on the data."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._documents = self._counter("documents", "Documents in parts, by outcome", outcome=("ok", "rejected"))
        self._tokens = self._counter("tokens", "Tokens computed: real ones and padding", kind=("real", "padding"))
        self._stage = self._counter("stage_seconds", "Seconds spent by stage, over all shards", stage=STAGES)
        self._attempts = self._counter("shard_attempts", "Shards leased, first and further tries")
        self._redelivered = self._counter("redelivered_shards", "Shards leased that had been tried before")
        self._recovered = self._counter("recovered_shards", "Expired leases and lost messages that were sent again")
        self._lost = self._counter("lost_leases", "Shards whose lease ended while this worker held them")
        self._handed_back = self._counter("handed_back_shards", "Shards released for another try")
        self._messages = self._counter("messages", "Messages received, by task", task=TASKS)
        self._refused = self._counter("refused_messages", "Messages and ledger entries that were not valid")
        self._requests = self._counter("request_documents", "Documents of requests that were tagged")
        self._defects = self._counter("unexpected_errors", "Errors that no store, device or ledger caused")
        self._silence = self._counter("broker_failures", "Checks of the broker that it did not answer")
        self._memory = self._gauge("broker_memory_bytes", "Memory that the broker uses")
        self._memory_limit = self._gauge("broker_memory_limit_bytes", "Memory that the broker may use")
        self._waiting = self._gauge("waiting_shards", "Shards of all runs that no worker began")
        self._leased = self._gauge("fleet_leased_shards", "Shards of all runs that some worker holds")
        self._duration = Histogram(
            "nermill_shard_seconds", "Seconds from claim to commit", buckets=SHARD_BUCKETS, registry=self.registry
        )
        self._fill = Histogram(
            "nermill_batch_fill_ratio",
            "Share of a batch's tokens that are not padding",
            buckets=FILL_BUCKETS,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        counter = Counter(f"nermill_{name}", text, list(labels), registry=self.registry)
        for values in labels.values():
            for value in values:
                counter.labels(value)  # present from the start, so that rates see the first increment
        return counter

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"nermill_{name}", text, registry=self.registry)

    def leased(self, attempts: int) -> None:
        """Counts a shard that was leased.

        Args:
            attempts: How often the shard has been leased, this time included.
        """
        self._attempts.inc()
        if attempts > 1:
            self._redelivered.inc()

    def committed(self, annotated: Annotated, seconds: float, **stages: float) -> None:
        """Counts a shard whose part this process wrote.

        Args:
            annotated: The tagged shard, with the seconds of the pipeline's stages.
            seconds: From the lease to the commit.
            stages: Seconds of the other stages, by name.
        """
        rejected = len(annotated.faults)
        self._documents.labels("ok").inc(annotated.part.num_rows - rejected)
        self._documents.labels("rejected").inc(rejected)
        stats = annotated.stats
        self._tokens.labels("real").inc(stats.tokens)
        self._tokens.labels("padding").inc(max(0, stats.computed_tokens - stats.tokens))
        for stage in ("tokenize", "wait", "compute", "decode"):
            self._stage.labels(stage).inc(getattr(stats, f"{stage}_seconds"))
        for stage, took in stages.items():
            self._stage.labels(stage).inc(max(0.0, took))  # negative where a clock was set back
        self._duration.observe(seconds)

    def ledger(self, recovered: int, waiting: int, leased: int) -> None:
        """Shows the state of the ledger, by which workers are scaled.

        Args:
            recovered: Shards that recovery sent again just now.
            waiting, leased: Shards of all runs that no worker began, and that some worker holds.
        """
        self._recovered.inc(recovered)
        self._waiting.set(waiting)
        self._leased.set(leased)

    def broker(self, used: int, limit: int) -> None:
        """Shows the broker's memory.

        Args:
            used, limit: Bytes in use, and bytes that may be used.
        """
        self._memory.set(used)
        self._memory_limit.set(limit)

    def broker_silent(self) -> None:
        """Counts a check that the broker did not answer."""
        self._silence.inc()

    def received(self, task: str) -> None:
        """Counts a message of a task."""
        self._messages.labels(task).inc()

    def refused(self) -> None:
        """Counts a message or a ledger entry that was not valid."""
        self._refused.inc()

    def requested(self, documents: int) -> None:
        """Counts the tagged documents of a request."""
        self._requests.inc(documents)

    def defect(self) -> None:
        """Counts an unexpected error."""
        self._defects.inc()

    def handed_back(self) -> None:
        """Counts a shard that was released for another try."""
        self._handed_back.inc()

    def lost(self) -> None:
        """Counts a lease that ended before its shard was committed."""
        self._lost.inc()

    def meter(self, engine: Engine) -> Engine:
        """Wraps an engine so that the fill of its batches is measured; for ``load_pipeline(wrap=...)``."""
        return MeteredEngine(engine, self._fill)

    def observe(
        self, pipeline: Pipeline, held: Callable[[], int], problem: Callable[[], str | None], device: str
    ) -> None:
        """Registers gauges that are read from a pipeline when Prometheus asks.

        Args:
            pipeline: The pipeline.
            held: Returns the number of shards that the process holds.
            problem: Returns what is wrong with the process, or None.
            device: Name of the device.
        """
        for name, text, read in (
            ("pool_tokens", "Tokens that wait for the device", pipeline.waiting_tokens),
            ("leased_shards", "Shards that this process holds", held),
            ("device_call_seconds", "How long the call of the device under way has taken", pipeline.clock.call_seconds),
            ("healthy", "1 while /healthz says ok", lambda: float(problem() is None)),
        ):
            self._gauge(name, text).set_function(read)
        self.registry.register(_BusySeconds(pipeline.clock))
        manifest = pipeline.manifest
        version = next((found.version for found in distributions(name="nermill")), "not installed")
        about = {"version": version, "artifact": manifest.sha256, "model": manifest.name, "device": device}
        Info("nermill_build", "What this process serves", registry=self.registry).info(about)


class MeteredEngine:
    """An engine that measures how full its batches are.

    Args:
        engine: The engine that computes.
        fill: Takes the share of each batch's tokens that are not padding.
    """

    def __init__(self, engine: Engine, fill: Histogram) -> None:
        self.manifest, self.device = engine.manifest, engine.device
        self.at_once, self.in_flight = engine.at_once, engine.in_flight
        self._engine = engine
        self._fill = fill

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """The engine's logits."""
        self._fill.observe(np.count_nonzero(batch.segments) / batch.segments.size)
        return self._engine.run(batch)

    def close(self) -> None:
        """Closes the wrapped engine."""
        self._engine.close()


class _BusySeconds(Collector):
    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Seconds in which the device computed"
        yield CounterMetricFamily("nermill_device_busy_seconds", text, value=self._clock.busy_seconds())


def serve(metrics: Metrics, port: int, problem: Callable[[], str | None]) -> None:
    """Serves ``/metrics`` and ``/healthz`` over HTTP; each request has a thread.

    Args:
        metrics: The metrics.
        port: TCP port, on all addresses.
        problem: Returns what is wrong with the process, or None; ``/healthz`` answers 503 or 200.

    Raises:
        UsageError: the port is in use or not allowed.
    """
    show = make_wsgi_app(metrics.registry)

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            return show(environ, start)  # type: ignore[no-any-return]
        wrong = problem()
        start("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [(wrong or "ok").encode() + b"\n"]

    try:
        server = make_server("", port, answer, _Server, _Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(f"metrics port {port}: {error}; choose another with NERMILL_METRICS_PORT") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = SLOW_CLIENT_SECONDS

    def log_message(self, *_: Any) -> None:
        """Logs nothing: probes are frequent."""
