"""The Celery application: where all rooms meet; ``nermill-worker`` starts one such process a device.

``celery -A worker.app worker --pool threads`` starts one by hand.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.signals import worker_init, worker_process_init, worker_ready, worker_shutdown, worker_shutting_down

from worker.contracts.broker import celery_app, redis_client
from worker.contracts.errors import MessageError, NermillError
from worker.contracts.ledger import Ledger
from worker.contracts.manifest import resolve_artifact
from worker.contracts.message import KEY_PREFIX, QUEUE, TASK, bell
from worker.doorkeeper import doorkeeper
from worker.metrics import Metrics, serve
from worker.mill import Mill
from worker.settings import Settings, read_settings

log = logging.getLogger("nermill.worker")

MAX_BELLS = 256  # rung at once for work that waits unheard
CHATTY_LOGGERS = ("celery.worker.strategy", "celery.app.trace")  # two lines a bell


def _configure() -> tuple[Settings, Celery]:
    try:
        settings = read_settings(os.environ)
        app = celery_app(settings.broker_url)
    except NermillError as error:
        raise SystemExit(f"nermill-worker: {error}") from None
    app.conf.update(worker_concurrency=settings.concurrency, worker_pool="threads")
    return settings, app


settings, app = _configure()


@dataclass
class Process:
    """What lives as long as the worker process."""

    mill: Mill
    stop: threading.Event


_process: Process | None = None


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def tag(version: int) -> None:
    """Answers one bell; the doorkeeper has looked at its version."""
    assert _process is not None
    _process.mill.metrics.rung()
    _process.mill.answer_bell()


def _refuse(error: MessageError) -> None:
    assert _process is not None
    _process.mill.metrics.refused()
    log.warning("dropped: %s", error)


app.steps["consumer"].add(doorkeeper(_refuse))


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _refuse_prefork(**_: Any) -> None:
    raise SystemExit("nermill-worker: an accelerator must not be forked; start Celery with --pool threads")


@worker_init.connect  # type: ignore[untyped-decorator]
def _start(**_: Any) -> None:
    """Loads and warms the model before the first bell is taken."""
    global _process
    from worker.pipeline import load_pipeline

    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        pipeline = load_pipeline(resolve_artifact(settings.model), settings.device, settings.threads)
        client = redis_client(settings.broker_url)
    except NermillError as error:
        raise SystemExit(f"nermill-worker: {error}") from None

    def ring(waiting: int) -> None:
        if not client.llen(KEY_PREFIX + QUEUE):
            for _ in range(min(waiting, MAX_BELLS)):
                app.send_task(TASK, kwargs=bell(), queue=QUEUE)

    metrics = Metrics()
    mill = Mill(pipeline, Ledger(client), settings, ring, metrics)
    metrics.observe(pipeline, lambda: len(mill.held), settings.device_name, settings.worker_name)
    if settings.metrics_port:
        serve(metrics, settings.metrics_port, mill.complaint)
    _process = Process(mill, threading.Event())
    for loop in (mill.keep, mill.watch):
        threading.Thread(target=loop, args=(_process.stop,), name=loop.__name__, daemon=True).start()


@worker_ready.connect  # type: ignore[untyped-decorator]
def _announce(**_: Any) -> None:
    if _process is not None:
        name = _process.mill.pipeline.manifest.name
        log.info("ready: %s on %s, allowed roots %s", name, settings.device_name, ", ".join(settings.roots))


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _begin_grace(**_: Any) -> None:
    """Lets what is held be finished within the grace period, then hands it back and ends."""
    if _process is None:
        return
    mill = _process.mill

    def enforce() -> None:
        mill.hand_back()
        os._exit(0)

    timer = threading.Timer(settings.grace_seconds, enforce)
    timer.daemon = True
    timer.start()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _end(**_: Any) -> None:
    if _process is not None:
        _process.stop.set()
        _process.mill.hand_back()
        _process.mill.pipeline.close()
