"""Leases shards in the place of a worker, for tests without a worker process."""

from __future__ import annotations

import itertools
import time

from nermill.worker.contracts.ledger import SETTLE_SECONDS, Ledger
from nermill.worker.contracts.records import Claim, WorkerProcess

_looks = itertools.count(1)


def next_claim(ledger: Ledger, artifact: str, lease_seconds: float = 60.0) -> Claim | None:
    """Leases the next shard that a worker with ``artifact`` may serve, without reading Celery's messages.

    Messages are taken from the ledger's record, as recovery does when it finds the queue empty. Returns None where no
    shard waits.
    """
    worker = WorkerProcess("stand-in", "cpu", "stand-in", artifact)
    later = (
        time.time() + next(_looks) * 2 * SETTLE_SECONDS
    )  # so that messages of the call before are old enough to be recovered
    for queue in ledger.queues():
        for message in (*ledger.promote(queue), *ledger.recover(queue, 0, later)):
            claim = ledger.lease(message.run_id, message.shard, worker, lease_seconds)
            if isinstance(claim, Claim):
                return claim
    return None
