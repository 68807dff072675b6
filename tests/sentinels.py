"""A primary, a replica and three sentinels on this machine, and a run during which the primary is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis

from nermill.producer.local.broker import find_server_binary
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send
from nermill.producer.runs.status import part_stats
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder
from tests.harness import DOUBLE, Harness, Server, free_port, harness, rows, texts

PASSWORD = "test-password"
SERVICE = "nermill"
SENTINELS = 3
CONFIGURATION = """
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {service} 127.0.0.1 {primary} 2
sentinel auth-pass {service} {password}
sentinel down-after-milliseconds {service} {milliseconds}
sentinel failover-timeout {service} 10000
"""


@dataclass(frozen=True)
class Failover:
    """One run during which the primary is killed.

    Attributes:
        documents: Size of the run.
        app: Module of the worker's application.
        batch_seconds: Seconds for each batch of the double's engine.
        down_after: Seconds without an answer after which sentinels take the primary to be down.
    """

    documents: int
    app: str = DOUBLE
    batch_seconds: float = 0.0
    down_after: float = 5.0


SHORT = Failover(documents=1_000, batch_seconds=0.2, down_after=0.5)
LONG = Failover(documents=20_000, batch_seconds=0.05)


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        pause: Longest stretch without a part from the primary's end on, in seconds.
        killed_in_the_middle: Whether parts were missing then.
    """

    table: list[dict[str, Any]]
    report: dict[str, Any]
    pause: float
    killed_in_the_middle: bool


def with_failover(failover: Failover) -> Outcome:
    """Runs ``nermill submit --wait`` and two workers by way of the sentinels, and kills the primary.

    Raises:
        AssertionError: a worker did not come over to the new primary.
    """
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--masterauth", PASSWORD]
    with (
        TemporaryDirectory(prefix="nm-") as folder,
        harness(Path(folder), options=options, password=PASSWORD) as fleet,
        watched(fleet, port, failover.down_after) as sentinels,
    ):
        hosts = ";".join(f"sentinel://:{PASSWORD}@127.0.0.1:{port}" for port in sentinels)
        url = f"{hosts}/0?master_name={SERVICE}"
        environment = {"NERMILL_BROKER_URL": url, "FAULT_BATCH_SECONDS": str(failover.batch_seconds)}
        for _ in range(2):
            fleet.worker(failover.app, **environment)
        for worker in fleet.workers:
            worker.await_ready()
        fleet.until(lambda: all(_is_complete(port) for port in sentinels))
        with fleet.submitting(texts(failover.documents), url=url) as producer:
            run = fleet.run_at_work()
            fleet.server.kill()
            killed = time.time()
            early = run.exists(SUCCESS_FILE)
            told, _ = producer.communicate(timeout=600)
        assert producer.returncode == 0, f"{told}\n{fleet.logs()}"
        for nth in range(len(fleet.workers)):
            _await_service_of_one(fleet, nth, url)
        return Outcome(rows(run), json.loads(told), _longest_pause(run, killed), not early)


def _longest_pause(run: RunFolder, since: float) -> float:
    finished = sorted(stats["finished"] for shard in run.committed() for stats in part_stats(run, shard))
    times = [since, *(moment for moment in finished if moment > since)]
    return float(max(later - earlier for earlier, later in pairwise(times)))


def _await_service_of_one(fleet: Harness, nth: int, url: str) -> None:
    """Waits until one worker has served a run while the others stood still: it came over to the new primary."""
    others = [worker for worker in fleet.workers if worker is not fleet.workers[nth]]
    for worker in others:
        worker.signal(signal.SIGSTOP)
    run, plan = fleet.plan(texts(32 + nth))
    send(run, plan, Queue(url))
    fleet.until(lambda: run.exists(SUCCESS_FILE), 25)
    for worker in others:
        worker.signal(signal.SIGCONT)


@contextmanager
def watched(fleet: Harness, port: int, down_after: float) -> Iterator[list[int]]:
    """Gives the fleet's server a replica, and both of them sentinels; yields the ports of the three."""
    with ExitStack() as stack:
        folder = fleet.folder / "replica"
        folder.mkdir()
        options = ["--port", str(free_port()), "--bind", "127.0.0.1", "--replicaof", "127.0.0.1", str(port)]
        replica = Server(folder, [*options, "--masterauth", PASSWORD], PASSWORD)
        stack.callback(replica.kill)
        yield [stack.enter_context(_sentinel(fleet.folder, port, down_after)) for _ in range(SENTINELS)]


@contextmanager
def _sentinel(folder: Path, primary: int, down_after: float) -> Iterator[int]:
    port = free_port()
    configuration = folder / f"sentinel-{port}.conf"
    settings = {"folder": folder, "primary": primary, "service": SERVICE, "password": PASSWORD}
    configuration.write_text(CONFIGURATION.format(port=port, milliseconds=round(down_after * 1000), **settings))
    command = [str(find_server_binary()), str(configuration), "--sentinel"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield port
        finally:
            process.kill()


def _is_complete(port: int) -> bool:
    """Whether a sentinel knows the others and a replica that it may promote."""
    with Redis(port=port, decode_responses=True) as client:
        known = client.sentinel_master(SERVICE)
    return (known["num-other-sentinels"], known["num-slaves"]) == (SENTINELS - 1, 1)
