"""What Prometheus sees of one worker process, and whether the process is healthy."""

from __future__ import annotations

import threading
import time
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
from nermill.worker.tagging.pipeline import Annotated, Pipeline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

STAGES = ("queue", "read", "tokenize", "wait", "compute", "decode", "write")
FILL_BUCKETS = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
SHARD_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
SLOW_CLIENT_SECONDS = 10.0  # whoever has not sent its request by then is let go

TASKS = (TAG_SHARD, FINISH_RUN, TAG_DOCUMENTS)


class Metrics:
    """Counters of one process; base units, no label that grows with the data."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._documents = self._counter("documents", "Documents in parts, by outcome", outcome=("ok", "rejected"))
        self._tokens = self._counter("tokens", "Tokens computed: real ones and padding", kind=("real", "padding"))
        self._stage = self._counter("stage_seconds", "Seconds spent by stage, over all shards", stage=STAGES)
        self._attempts = self._counter("shard_attempts", "Shards leased, first and further tries")
        self._redelivered = self._counter("redelivered_shards", "Shards leased that had been tried before")
        self._recovered = self._counter("recovered_shards", "Expired leases and lost messages that were sent again")
        self._lost = self._counter("lost_leases", "Shards that went to another worker while this one held them")
        self._handed_back = self._counter("handed_back_shards", "Shards handed back for another try")
        self._messages = self._counter("messages", "Messages received, by task", task=TASKS)
        self._refused = self._counter("refused_messages", "Messages and ledger entries that did not fit the contract")
        self._requests = self._counter("request_documents", "Documents of requests that were tagged")
        self._defects = self._counter("unexpected_errors", "Errors that are no fault of a store, device or ledger")
        self._silence = self._counter("broker_failures", "Times the broker did not answer when it was looked at")
        self._memory = self._gauge("broker_memory_bytes", "Memory that the broker uses")
        self._memory_limit = self._gauge("broker_memory_limit_bytes", "Memory that the broker may use")
        self._waiting = self._gauge("waiting_shards", "Shards of all runs that no worker began")
        self._leased = self._gauge("fleet_leased_shards", "Shards of all runs that some worker holds")
        self._duration = Histogram(
            "nermill_shard_seconds", "Seconds from claim to commit", buckets=SHARD_BUCKETS, registry=self.registry
        )
        self._fill = Histogram(
            "nermill_batch_fill_ratio", "Real tokens of a batch's", buckets=FILL_BUCKETS, registry=self.registry
        )

    def _counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        counter = Counter(f"nermill_{name}", text, list(labels), registry=self.registry)
        for values in labels.values():
            for value in values:
                counter.labels(value)  # a rate begins at zero, not where the first one was counted
        return counter

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"nermill_{name}", text, registry=self.registry)

    def leased(self, attempts: int) -> None:
        """A shard was leased, for the first time or again."""
        self._attempts.inc()
        if attempts > 1:
            self._redelivered.inc()

    def committed(self, annotated: Annotated, seconds: float, **stages: float) -> None:
        """A shard's part is there; it took ``seconds`` in all, and ``stages`` beside those of the pipeline."""
        rejected = len(annotated.faults)
        self._documents.labels("ok").inc(annotated.part.num_rows - rejected)
        self._documents.labels("rejected").inc(rejected)
        stats = annotated.stats
        self._tokens.labels("real").inc(stats.tokens)
        self._tokens.labels("padding").inc(max(0, stats.computed_tokens - stats.tokens))
        for stage in ("tokenize", "wait", "compute", "decode"):
            self._stage.labels(stage).inc(getattr(stats, f"{stage}_seconds"))
        for stage, took in stages.items():
            self._stage.labels(stage).inc(max(0.0, took))  # clocks are set back now and then
        self._duration.observe(seconds)

    def ledger(self, recovered: int, waiting: int, leased: int) -> None:
        """What recovery sent again, and the shards of all runs that wait and are leased: what to scale workers by."""
        self._recovered.inc(recovered)
        self._waiting.set(waiting)
        self._leased.set(leased)

    def broker(self, used: int, limit: int) -> None:
        """Bytes that the broker uses and may use."""
        self._memory.set(used)
        self._memory_limit.set(limit)

    def broker_silent(self) -> None:
        """The broker did not answer."""
        self._silence.inc()

    def received(self, task: str) -> None:
        """A message was received."""
        self._messages.labels(task).inc()

    def refused(self) -> None:
        """A message or an entry did not fit the contract."""
        self._refused.inc()

    def requested(self, documents: int) -> None:
        """A request's documents were tagged."""
        self._requests.inc(documents)

    def defect(self) -> None:
        """An unexpected error."""
        self._defects.inc()

    def handed_back(self) -> None:
        """A shard was handed back."""
        self._handed_back.inc()

    def lost(self) -> None:
        """A shard went to another worker."""
        self._lost.inc()

    def meter(self, engine: Engine) -> Engine:
        """The engine, with its batches measured from now on, those that warm it up included."""
        metered = MeteredEngine(engine, self._fill)
        self.registry.register(_BusySeconds(metered))
        return metered

    def observe(
        self, pipeline: Pipeline, held: Callable[[], int], problem: Callable[[], str | None], device: str
    ) -> None:
        """Shows a pipeline's state, which is read when Prometheus asks."""
        for name, text, read in (
            ("pool_tokens", "Tokens that wait for the device", pipeline.waiting_tokens),
            ("leased_shards", "Shards that this process holds", held),
            ("device_call_seconds", "How long the call of the device under way has taken", pipeline.busy_seconds),
            ("healthy", "1 while /healthz says ok", lambda: float(problem() is None)),
        ):
            self._gauge(name, text).set_function(read)
        manifest = pipeline.manifest
        version = next((found.version for found in distributions(name="nermill")), "not installed")
        about = {"version": version, "artifact": manifest.sha256, "model": manifest.name, "device": device}
        Info("nermill_build", "What this process serves", registry=self.registry).info(about)


class MeteredEngine:
    """An engine whose batches are measured: how full they are, and how long the device had any of them."""

    def __init__(self, engine: Engine, fill: Histogram) -> None:
        self.manifest, self.device, self.in_flight = engine.manifest, engine.device, engine.in_flight
        self._engine = engine
        self._fill = fill
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._busy = 0.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """The engine's logits."""
        self._fill.observe(np.count_nonzero(batch.segments) / batch.segments.size)
        self._change(1)
        try:
            return self._engine.run(batch)
        finally:
            self._change(-1)

    def busy_seconds(self) -> float:
        """Seconds in which at least one call was under way."""
        self._change(0)
        return self._busy

    def close(self) -> None:
        """Gives the device back."""
        self._engine.close()

    def _change(self, calls: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._under_way:
                self._busy += now - self._since
            self._since = now
            self._under_way += calls


class _BusySeconds(Collector):
    def __init__(self, engine: MeteredEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Seconds in which the device computed"
        yield CounterMetricFamily("nermill_device_busy_seconds", text, value=self._engine.busy_seconds())


def serve(metrics: Metrics, port: int, problem: Callable[[], str | None]) -> None:
    """Serves ``/metrics`` and ``/healthz``, each request on a thread of its own.

    Args:
        metrics: What to show.
        port: TCP port.
        problem: Returns what is wrong, or None.

    Raises:
        UsageError: the port cannot be had.
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
        """Keeps probes out of the log."""
