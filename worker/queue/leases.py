"""The leases of a process: taken, kept while their shards are tagged, given back; and recovery of what others lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nermill.worker.contracts.deadline import within
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import LeaseLostError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import QUEUE, queue_of
from nermill.worker.contracts.records import Claim, WorkerProcess
from nermill.worker.process.metrics import Metrics
from nermill.worker.tagging.pool import Job

log = logging.getLogger("nermill.worker")

RELEASE_SECONDS = 5.0  # for giving leases back when the process ends
LEDGER_PAUSE = 0.5  # seconds between two tries of a ledger that does not answer

T = TypeVar("T")


class Leases:
    """What a process holds.

    Args:
        ledger: Gives the leases.
        dispatcher: Sends the messages that are due.
        identity: The process, as the ledger names it.
        seconds: Length of a lease.

    Attributes:
        stopping: Set once the process takes no more work and no longer waits for a ledger that does not answer.
        queues: The queues of shards that the process consumes from.
    """

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher, identity: WorkerProcess, seconds: float) -> None:
        self.ledger = ledger
        self.identity = identity
        self.seconds = seconds
        self.queues = (QUEUE, queue_of(identity.artifact))
        self.stopping = threading.Event()
        self._dispatcher = dispatcher
        self._held: dict[tuple[str, str], Claim] = {}
        self._jobs: dict[tuple[str, str], Job] = {}  # windows of the held shards that are on the device or wait for it

    @property
    def held(self) -> list[Claim]:
        """Shards that this process holds."""
        return list(self._held.values())

    def take(self, run_id: str, shard: int | None) -> Claim | str:
        """Leases a shard, or a run's last step; see ``Ledger.lease``."""
        return self.patiently(lambda: self.ledger.lease(run_id, shard, self.identity, self.seconds))

    def renew(self, claim: Claim) -> bool:
        """Extends a lease; False where it ended: another worker may hold the shard, or nobody."""
        return self.patiently(lambda: self.ledger.renew(claim, self.seconds))

    def prove(self, claim: Claim) -> None:
        """Extends a lease before something is written that another worker may write too.

        Raises:
            LeaseLostError: it ended.
        """
        if not self.renew(claim):
            raise LeaseLostError

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        """The block is one in which ``keep`` renews the lease, and ``release_all`` gives it back."""
        key = claim.run_id, claim.key
        self._held[key] = claim
        try:
            yield
        finally:
            self._jobs.pop(key, None)
            if self._held.get(key) is claim:  # else its lease ran out, and another of our threads has it
                del self._held[key]

    def note(self, claim: Claim, job: Job) -> None:
        """Remembers the windows of a held shard, whose progress is told with its renewals."""
        self._jobs[claim.run_id, claim.key] = job

    def patiently(self, call: Callable[[], T]) -> T:
        """The call's result, tried again while the ledger does not answer and the process does not stop."""
        answers = True
        while True:
            try:
                return call()
            except (RedisConnectionError, RedisTimeoutError, OperationalError) as error:
                if self.stopping.is_set():
                    raise
                if answers:
                    log.warning("the ledger does not answer (%s); it is tried again", error)
                answers = False
                self.stopping.wait(LEDGER_PAUSE)

    def promote(self) -> None:
        """Sends what is due; what cannot be sent now is found by recovery."""
        try:
            self._dispatcher.promote(self.queues)
        except (RedisError, OperationalError, OSError) as error:
            log.warning("messages that are due could not be sent (%s); recovery sends them", error)

    def promote_all(self) -> None:
        """Sends what is due on all queues, those of other artifacts included."""
        self.patiently(lambda: self._dispatcher.promote(self.ledger.queues()))

    def keep(self, stop: threading.Event, metrics: Metrics, note_defect: Callable[[], None]) -> None:
        """Renews leases, recovers what others lost, and says that this process lives; returns when ``stop`` is set.

        Args:
            stop: Set when the process ends.
            metrics: Where the ledger's load, and what was recovered, are counted.
            note_defect: Called for each error that is no fault of the ledger.
        """
        pause = min(self.seconds / 3, 5.0)
        stopping = False
        while not stopping:
            try:
                self.ledger.register(self.identity, 3 * pause)
                for claim in self.held:
                    job = self._jobs.get((claim.run_id, claim.key))
                    tokens = None if job is None else (job.tokens_done, len(job.tokens.ids))
                    self.ledger.renew(claim, self.seconds, tokens=tokens)
                recovered = self._dispatcher.recover(pause)
                metrics.ledger(recovered, *self.ledger.load())
            except (RedisError, OperationalError, OSError) as error:
                log.warning("the ledger does not answer (%s); leases are renewed as soon as it does", error)
            except Exception:
                log.exception("leases could not be renewed")
                note_defect()
            stopping = stop.wait(pause)
        try:
            self.ledger.register(self.identity, 0)
        except (RedisError, OSError):
            return  # its entry expires

    def release_all(self) -> bool:
        """Releases whatever is held and sends its messages again: another worker may begin it at once.

        Where the ledger does not answer, the leases run out instead: the caller is about to end the process.

        Returns:
            Whether the ledger answered, or nothing was held.
        """

        def release() -> None:
            held = self.held
            for claim in held:
                self.ledger.release(claim)
            if held:
                self._dispatcher.promote(self.queues)

        try:
            within(RELEASE_SECONDS, release)
        except (RedisError, OperationalError, OSError) as error:
            log.warning("the ledger does not answer (%s); what was held is tried again when its leases end", error)
            return False
        return True
