"""What Prometheus sees of one worker process, and whether the process is healthy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app

from worker.pipeline import Annotated, Pipeline

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

STAGES = ("queue", "tokenize", "wait", "compute", "decode", "write")


class Metrics:
    """Counters of one process; base units, no label that grows with the data."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._documents = self._counter("documents", "Documents by outcome", ["outcome"])
        self._tokens = self._counter("tokens", "Tokens computed: real ones and padding", ["kind"])
        self._stage = self._counter("stage_seconds", "Seconds spent by stage, over all shards", ["stage"])
        self._bells = self._counter("bells", "Bells answered, with or without a shard to be had")
        self._refused = self._counter("refused_messages", "Bells and ledger entries that did not fit the contract")
        self._handed_back = self._counter("handed_back_shards", "Shards handed back for another try")
        self._retries = self._counter("shard_retries", "Shards that had been tried before")
        self._duration = Histogram("nermill_shard_seconds", "Seconds from claim to commit", registry=self.registry)

        self._waiting = Gauge("nermill_waiting_shards", "Shards of all runs that wait", registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"nermill_{name}", text, list(labels), registry=self.registry)

    def committed(self, annotated: Annotated, attempts: int, seconds: float, write_seconds: float) -> None:
        """A shard's part is there."""
        rejected = len(annotated.faults)
        self._documents.labels("ok").inc(annotated.part.num_rows - rejected)
        self._documents.labels("rejected").inc(rejected)
        stats = annotated.stats
        self._tokens.labels("real").inc(stats.tokens)
        self._tokens.labels("padding").inc(max(0, stats.computed_tokens - stats.tokens))
        for stage in ("tokenize", "wait", "compute", "decode"):
            self._stage.labels(stage).inc(getattr(stats, f"{stage}_seconds"))
        self._stage.labels("write").inc(write_seconds)
        self._duration.observe(seconds)
        if attempts > 1:
            self._retries.inc()

    def waiting(self, shards: int) -> None:
        """How many shards wait in the ledger, for whoever scales workers."""
        self._waiting.set(shards)

    def rung(self) -> None:
        """A bell was answered."""
        self._bells.inc()

    def refused(self) -> None:
        """A bell or an entry did not fit the contract."""
        self._refused.inc()

    def handed_back(self) -> None:
        """A shard was handed back."""
        self._handed_back.inc()

    def observe(self, pipeline: Pipeline, held: Callable[[], int], device: str, worker: str) -> None:
        """Gauges that are read when Prometheus asks."""
        for name, text, read in (
            ("pool_tokens", "Tokens that wait for the device", pipeline.waiting_tokens),
            ("leased_shards", "Shards that this process holds", held),
            ("device_busy_seconds", "How long the call under way has taken", pipeline.busy_seconds),
        ):
            Gauge(f"nermill_{name}", text, registry=self.registry).set_function(read)
        busy = Gauge("nermill_device_compute_seconds_total", "Seconds the device has computed", registry=self.registry)
        busy.set_function(lambda: pipeline.computed_seconds)
        manifest = pipeline.manifest
        build = Info("nermill_build", "What this process serves", registry=self.registry)
        build.info({"artifact": manifest.sha256, "model": manifest.name, "device": device, "worker": worker})


def serve(metrics: Metrics, port: int, healthy: Callable[[], str | None]) -> None:
    """Serves ``/metrics`` and ``/healthz`` on a thread of its own.

    Args:
        metrics: What to show.
        port: TCP port.
        healthy: Returns what is wrong, or None.
    """
    show = make_wsgi_app(metrics.registry)

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/healthz":
            return show(environ, start)  # type: ignore[no-any-return]
        complaint = healthy()
        start("503 Service Unavailable" if complaint else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [(complaint or "ok").encode() + b"\n"]

    server = make_server("", port, answer, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Keeps probes out of the log."""
