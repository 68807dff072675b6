"""A worker's place in the queue, for tests that want its claims without a worker process."""

from __future__ import annotations

import itertools
import time

from nermill.worker.contracts.ledger import SETTLE_SECONDS, Claim, Ledger, WorkerProcess

_looks = itertools.count(1)


def next_claim(ledger: Ledger, artifact: str, lease_seconds: float = 60.0) -> Claim | None:
    """Leases the next shard that ``artifact`` may serve, without reading Celery's messages.

    What was promoted or sent to the queue is taken from the ledger's own record of messages, as recovery does when the
    queue is found empty.
    """
    worker = WorkerProcess("stand-in", "cpu", "stand-in", artifact)
    later = time.time() + next(_looks) * 2 * SETTLE_SECONDS  # each look finds the last one's messages old enough
    for queue in ledger.queues():
        for message in (*ledger.promote(queue), *ledger.recover(queue, 0, later)):
            claim = ledger.lease(message.run_id, message.shard, worker, lease_seconds)
            if isinstance(claim, Claim):
                return claim
    return None
