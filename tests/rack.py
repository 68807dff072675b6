"""A run over four hosts with addresses: producer, broker and two workers, some of which are disconnected at times."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder
from tests.harness import Harness, harness, rows, texts
from tests.hosts import Hosts, hosts

PASSWORD = "test-password"
PORT = 6379
WORKERS = ("worker1", "worker2")


@dataclass(frozen=True)
class Rehearsal:
    """One run and its faults.

    Attributes:
        documents: Size of the run.
        batch_seconds: Seconds for each batch of a worker's engine.
        latency: Seconds on each link, each way; there are two links between two hosts.
        lease_seconds: Lease of the workers.
        worker_away: Seconds for which one worker's host is disconnected; longer than the lease.
        broker_away: Seconds for which the broker's host is disconnected, after that.
    """

    documents: int
    batch_seconds: float
    latency: float = 0.005
    lease_seconds: float = 3.0
    worker_away: float = 0.0
    broker_away: float = 0.0


SHORT = Rehearsal(documents=1_200, batch_seconds=0.3, lease_seconds=1.5, worker_away=2.2, broker_away=1.0)
LONG = Rehearsal(documents=20_000, batch_seconds=0.35, lease_seconds=5.0, worker_away=12.0, broker_away=20.0)
SWIFT = Rehearsal(documents=20_000, batch_seconds=0.12)  # without faults


@dataclass(frozen=True)
class Outcome:
    """The result.

    Attributes:
        table: Rows of all parts.
        report: What the producer printed.
        redeliveries: Shards that were tried again.
        pause: Seconds without a new part after the broker was connected again.
        told_after: Seconds from the end of the run to the end of the producer.
        harmed_to_the_end: Whether the run was still going when the last host was connected again.
    """

    table: list[dict[str, Any]]
    report: dict[str, Any]
    redeliveries: int
    pause: float
    told_after: float
    harmed_to_the_end: bool


def over_four_hosts(rehearsal: Rehearsal) -> Outcome:
    """Runs ``nermill submit --wait`` on one host, with the broker and two workers on others."""
    with (
        TemporaryDirectory(prefix="nm-") as folder,
        hosts("producer", "broker", *WORKERS, latency=rehearsal.latency) as rack,
        harness(
            Path(folder),
            lease_seconds=rehearsal.lease_seconds,
            options=["--port", str(PORT), "--bind", rack.address("broker")],
            password=PASSWORD,
            within=rack.enter("broker"),
        ) as fleet,
    ):
        url = f"redis://:{PASSWORD}@{rack.address('broker')}:{PORT}/0"
        slow = str(rehearsal.batch_seconds)
        for host in WORKERS:
            fleet.worker(within=rack.enter(host), NERMILL_BROKER_URL=url, FAULT_BATCH_SECONDS=slow)
        for worker in fleet.workers:
            worker.await_ready()
        documents = texts(rehearsal.documents)
        with fleet.submitting(documents, url=url, within=rack.enter("producer")) as producer:
            run = fleet.run_at_work()
            pause = _harm(rehearsal, rack, run, fleet)
            early = run.exists(SUCCESS_FILE)
            told, _ = producer.communicate(timeout=600)
        told_after = time.time() - Path(run.path(SUCCESS_FILE)).stat().st_mtime
        assert producer.returncode == 0, f"{told}\n{fleet.logs()}"
        report = json.loads(told)
        with fleet.queue().ledger() as ledger:
            redeliveries = ledger.progress(report["run_id"]).redeliveries
        return Outcome(rows(run), report, redeliveries, pause, told_after, not early)


def _harm(rehearsal: Rehearsal, rack: Hosts, run: RunFolder, fleet: Harness) -> float:
    if rehearsal.worker_away:
        with rack.cut_off(WORKERS[0]):
            time.sleep(rehearsal.worker_away)
    if not rehearsal.broker_away:
        return 0.0
    time.sleep(1)
    with rack.cut_off("broker"):
        time.sleep(rehearsal.broker_away)
        before = run.committed()
    return fleet.until(lambda: run.committed() > before)
