"""The Celery application: where all rooms meet; ``nermill-worker`` starts one such process a device.

``celery -A nermill.worker.app worker --pool threads`` starts one by hand.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.signals import (
    setup_logging,
    worker_init,
    worker_process_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nermill.worker import logs, tracing
from nermill.worker.contracts.broker import celery_app, redis_client
from nermill.worker.contracts.errors import MessageError, NermillError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import resolve_artifact
from nermill.worker.contracts.message import KEY_PREFIX, MAX_BELLS, QUEUE, TASK
from nermill.worker.contracts.patience import within
from nermill.worker.doorkeeper import doorkeeper, fresh_bell
from nermill.worker.heartbeat import beat
from nermill.worker.metrics import Metrics, serve
from nermill.worker.mill import HAND_BACK_SECONDS, Mill
from nermill.worker.settings import Settings, read_settings

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("nermill.worker")

TRACING_SECONDS = 3.0  # for the last spans, when the grace is over
BROKER_SECONDS = 10.0  # between two looks at the broker
CHATTY_LOGGERS = ("celery.worker.strategy", "celery.app.trace")  # two lines a bell


def _configure() -> tuple[Settings, Celery]:
    try:
        settings = read_settings(os.environ)
        logs.configure(settings.log_format, device=settings.device_name, worker=settings.worker_name)
        tracing.start_from(os.environ, settings.worker_name, settings.device_name)
        app = celery_app(settings.broker_url)
    except NermillError as error:
        logs.complain(error)
        raise SystemExit(error.exit_code) from None
    app.conf.update(worker_concurrency=settings.concurrency, worker_pool="threads")
    return settings, app


settings, app = _configure()


@setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logging(loglevel: int, **_: Any) -> None:
    """Celery leaves the logs, and what is printed, alone where somebody answers this."""
    logging.getLogger().setLevel(loglevel)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass
class Process:
    """What lives as long as the worker process."""

    mill: Mill
    stop: threading.Event
    leaving: threading.Event
    keeper: threading.Thread

    def take_leave(self) -> None:
        """Hands back what is held and signs off from the ledger, unless that stays silent."""
        self.stop.set()
        if self.mill.hand_back():
            self.keeper.join(HAND_BACK_SECONDS)


_process: Process | None = None


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def tag(version: int) -> None:
    """Answers one bell; the doorkeeper has looked at its version."""
    assert _process is not None
    _process.mill.metrics.rung()
    _process.mill.work(_process.leaving)


def _refuse(error: MessageError) -> None:
    assert _process is not None
    _process.mill.metrics.refused()
    log.warning("dropped: %s", error)


app.steps["consumer"].add(doorkeeper(_refuse))


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _refuse_other_pools(**_: Any) -> None:
    raise SystemExit("nermill-worker: start Celery with --pool threads: one process has the model, a shard is a thread")


@worker_init.connect  # type: ignore[untyped-decorator]
def _start(**_: Any) -> None:
    """Loads and warms the model before the first bell is taken."""
    global _process
    from nermill.worker.pipeline import load_pipeline

    def ring(waiting: int) -> None:
        queue = KEY_PREFIX + QUEUE
        if not client.llen(queue):  # all in one round trip: whoever rings has leases to renew
            client.lpush(queue, *(json.dumps(fresh_bell()) for _ in range(min(waiting, MAX_BELLS))))

    try:
        pipeline = load_pipeline(resolve_artifact(settings.model), settings.device, settings.threads)
        client = redis_client(settings.broker_url)
        metrics = Metrics()
        mill = Mill(pipeline, Ledger(client), settings, ring, metrics)
        metrics.observe(pipeline, lambda: len(mill.held), mill.complaint, settings.device_name)
        if settings.metrics_port:
            serve(metrics, settings.metrics_port, mill.complaint)
    except NermillError as error:  # the device or the port may be free next time
        logs.complain(error)
        raise SystemExit(1) from None
    except Exception:  # Celery would swallow it, and go on without a model
        log.exception("the worker cannot start")
        raise SystemExit(1) from None
    stop = threading.Event()
    loops: dict[str, Callable[[], None]] = {
        "keep": lambda: mill.keep(stop),
        "watch": lambda: mill.watch(stop),
        "beat": lambda: beat(os.environ, mill.complaint, stop),
        "broker": lambda: _watch_broker(client, metrics, stop),
    }
    threads = {name: threading.Thread(target=loop, name=name, daemon=True) for name, loop in loops.items()}
    _process = Process(mill, stop, leaving=threading.Event(), keeper=threads["keep"])
    for thread in threads.values():
        thread.start()


def _watch_broker(client: Redis, metrics: Metrics, stop: threading.Event) -> None:
    """Looks at the memory of the broker, which refuses work when it is full, until ``stop``."""
    while True:
        try:
            memory = client.info("memory")
            metrics.broker(memory["used_memory"], memory["maxmemory"] or memory.get("total_system_memory", 0))
        except (RedisConnectionError, RedisTimeoutError):
            metrics.broker_silent()
        except (RedisError, KeyError):
            pass  # it answers, and does not tell: so do many that others manage
        if stop.wait(BROKER_SECONDS):
            return


@worker_ready.connect  # type: ignore[untyped-decorator]
def _announce(**_: Any) -> None:
    if _process is not None:
        name = _process.mill.pipeline.manifest.name
        log.info("ready: %s on %s, allowed roots %s", name, settings.device_name, ", ".join(settings.roots))


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _begin_grace(**_: Any) -> None:
    """Lets what is held be finished within the grace period, then hands it back and ends."""
    if (process := _process) is None:
        return
    process.leaving.set()

    def enforce() -> None:
        process.take_leave()
        with suppress(TimeoutError):
            within(TRACING_SECONDS, tracing.stop)
        os._exit(0)

    timer = threading.Timer(settings.grace_seconds, enforce)
    timer.daemon = True
    timer.start()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _end(**_: Any) -> None:
    if _process is not None:
        _process.take_leave()
        _process.mill.pipeline.close()
        tracing.stop()


if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
