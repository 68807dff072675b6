"""The Celery application of a worker process: its three tasks, and what starts and ends with the process.

``nermill-worker`` starts one such process for each device. ``celery -A nermill.worker.app worker --pool threads``
starts one by hand; Celery then puts the working directory first on the import path.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.concurrency import get_implementation
from celery.concurrency.thread import TaskPool
from celery.exceptions import SecurityWarning
from celery.signals import (
    setup_logging,
    task_rejected,
    task_unknown,
    worker_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from kombu import Exchange, Queue
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nermill.worker.contracts.broker import celery_app, first_version, redis_client
from nermill.worker.contracts.deadline import within
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import MessageError, NermillError, UsageError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import resolve_artifact
from nermill.worker.contracts.message import FINISH_RUN, FIRST_VERSION_TASK, QUEUE, TAG_DOCUMENTS, TAG_SHARD
from nermill.worker.process import logs, tracing
from nermill.worker.process.health import send_heartbeats
from nermill.worker.process.metrics import Metrics, serve
from nermill.worker.process.settings import Settings, read_settings
from nermill.worker.queue import requests
from nermill.worker.queue.consumer import harden, room_step, strategy
from nermill.worker.queue.leases import RELEASE_SECONDS
from nermill.worker.queue.shards import ShardWorker

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("nermill.worker")

TRACING_SECONDS = 3.0  # for the last spans, when the grace period is over
BROKER_SECONDS = 10.0  # between two looks at the broker
REQUEST_THREADS = 8  # beside those of shards: for requests and the last steps of runs
LINE_LOGGERS = ("celery.worker.consumer.consumer", "celery.worker.pidbox", "kombu.pidbox", "kombu.transport.redis")
QUIET_LOGGERS = ("celery.worker.strategy", "celery.app.trace", "celery.worker.consumer.consumer")  # lines a message


def _refuse(reason: str) -> None:
    _shards().refuse(reason)


def _queue(name: str) -> Queue:
    """A queue as Celery declares one that a sender names and does not know."""
    return Queue(name, Exchange(name), routing_key=name)


def _configure() -> tuple[Settings, Celery]:
    try:
        settings = read_settings(os.environ)
        logs.configure(settings.log_format, device=settings.device_name, worker=settings.worker_name)
        tracing.start_from(os.environ, settings.worker_name, settings.device_name)
        harden(_refuse)
        warnings.filterwarnings("ignore", category=SecurityWarning)  # of root and pickle; JSON alone is accepted
        app = celery_app(settings.broker_url, results=True, result_seconds=settings.result_seconds)
    except NermillError as error:
        logs.report_error(error)
        raise SystemExit(error.exit_code) from None
    app.conf.update(
        worker_concurrency=settings.concurrency + REQUEST_THREADS,
        worker_pool="threads",
        worker_send_task_events=True,
        task_queues=[_queue(QUEUE)],  # the artifact's own is added once the artifact is loaded
    )
    return settings, app


settings, app = _configure()


@dataclass
class Process:
    """What lives as long as the worker process."""

    shards: ShardWorker
    stop: threading.Event
    lease_renewer: threading.Thread

    def end(self) -> None:
        """Releases what is held and signs off from the ledger, unless that does not answer."""
        self.stop.set()
        if self.shards.leases.release_all():
            self.lease_renewer.join(RELEASE_SECONDS)


_process: Process | None = None


def _shards() -> ShardWorker:
    assert _process is not None
    return _process.shards


_options: dict[str, Any] = {"trail": False, "throws": (MessageError,), "Strategy": staticmethod(strategy(_shards))}


@app.task(name=TAG_SHARD, bind=True, **_options)  # type: ignore[untyped-decorator]
def tag_shard(self: Any, run_id: str, folder: str, shard: int) -> dict[str, Any]:
    """Tags one shard of a run; see ``ShardWorker.tag_shard``."""
    return _shards().tag_shard(self.request.id, run_id, folder, shard)


@app.task(name=FINISH_RUN, **_options)  # type: ignore[untyped-decorator]
def finish_run(run_id: str, folder: str) -> dict[str, Any]:
    """Marks a run complete and evaluates it; see ``ShardWorker.finish_run``."""
    return _shards().finish_run(run_id, folder)


@app.task(name=TAG_DOCUMENTS, acks_late=False, **_options)  # type: ignore[untyped-decorator]
def tag_documents(documents: list[Any], options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Tags a few documents at once; see ``worker.queue.requests``."""
    return requests.tag_documents(_shards(), documents, options)


app.finalize()
for name in [name for name in app.tasks if name.startswith("celery.")]:
    app.tasks.unregister(name)
app.steps["consumer"].add(room_step(_shards))


@setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logging(loglevel: int, **_: Any) -> None:
    """Celery leaves the logs, and what is printed, alone where this signal has a receiver."""
    logging.getLogger().setLevel(loglevel)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in LINE_LOGGERS:
        logging.getLogger(name).addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """What hostile messages make Celery log: its pages about a message are left out, others get one short line."""
    record.msg, record.args = " ".join(record.getMessage().split())[:300], ()
    record.exc_info = record.exc_text = None
    return not record.msg.startswith(("Received unregistered", "Received invalid", "Received and deleted"))


@task_unknown.connect  # type: ignore[untyped-decorator]
def _refuse_unknown(name: str, **_: Any) -> None:
    if name == FIRST_VERSION_TASK:
        _refuse("a message of nermill 1, which this version does not serve; its runs need its own workers")
    else:
        _refuse(f"a message for the task {name!r:.80}, which is not one of nermill's")


@task_rejected.connect  # type: ignore[untyped-decorator]
def _refuse_rejected(exc: Exception | None, **_: Any) -> None:
    _refuse(f"a message that Celery does not take ({' '.join(str(exc or 'no task message').split()):.120})")


def _check_pool(pool: type) -> None:
    """Celery itself takes ``--pool prefork``, which is its default, for the pool of the settings: threads."""
    if not issubclass(pool, TaskPool):
        name = pool.__module__.rpartition(".")[2]
        raise UsageError(f"--pool {name}: a device is one process's; start Celery with --pool threads")


@worker_init.connect  # type: ignore[untyped-decorator]
def _start(sender: Any, **_: Any) -> None:
    """Loads and warms the model before the first message is received."""
    global _process
    from nermill.worker.tagging.pipeline import load_pipeline

    try:
        _check_pool(get_implementation(sender.pool_cls))
    except UsageError as error:
        logs.report_error(error)
        raise SystemExit(error.exit_code) from None
    try:
        metrics = Metrics()
        artifact = resolve_artifact(settings.model)
        pipeline = load_pipeline(artifact, settings.device, settings.threads, wrap=metrics.meter)
        client = redis_client(settings.broker_url)
        ledger = Ledger(client)
        shards = ShardWorker(pipeline, ledger, Dispatcher(celery_app(settings.broker_url), ledger), settings, metrics)
        problem = shards.watchdog.problem
        metrics.observe(pipeline, lambda: len(shards.leases.held), problem, settings.device_name)
        if settings.metrics_port:
            serve(metrics, settings.metrics_port, problem)
    except NermillError as error:  # the device or the port may be free next time
        logs.report_error(error)
        raise SystemExit(1) from None
    except Exception:  # Celery would log it and go on without a model
        log.exception("the worker cannot start")
        raise SystemExit(1) from None
    with suppress(RedisError):  # a broker that does not answer yet is waited for below
        if told := first_version(redis_client(settings.broker_url, patient=False)):
            log.warning("%s", told)
    app.amqp.queues.select_add(_queue(shards.leases.queues[1]))
    stop = threading.Event()
    loops: dict[str, Callable[[], None]] = {
        "keep": lambda: shards.leases.keep(stop, metrics, shards.watchdog.note_defect),
        "watch": lambda: shards.watchdog.watch(stop, shards.leases.release_all),
        "heartbeat": lambda: send_heartbeats(os.environ, problem, stop),
        "broker": lambda: _watch_broker(client, metrics, stop),
    }
    threads = {name: threading.Thread(target=loop, name=name, daemon=True) for name, loop in loops.items()}
    _process = Process(shards, stop, lease_renewer=threads["keep"])
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
            pass  # it answers, and does not tell: so do many managed servers
        if stop.wait(BROKER_SECONDS):
            return


@worker_ready.connect  # type: ignore[untyped-decorator]
def _announce(**_: Any) -> None:
    if _process is not None:
        name = _process.shards.pipeline.manifest.name
        log.info("ready: %s on %s, allowed roots %s", name, settings.device_name, ", ".join(settings.roots))


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _begin_grace(**_: Any) -> None:
    """Lets what is held be finished within the grace period, then releases it and ends."""
    if (process := _process) is None:
        return
    process.shards.leases.stopping.set()

    def enforce() -> None:
        process.end()
        with suppress(TimeoutError):
            within(TRACING_SECONDS, tracing.stop)
        os._exit(0)

    timer = threading.Timer(settings.grace_seconds, enforce)
    timer.daemon = True
    timer.start()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _end(**_: Any) -> None:
    if _process is not None:
        _process.end()
        _process.shards.pipeline.close()
        tracing.stop()


if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
