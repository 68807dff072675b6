"""What the ledger keeps and tells: states of a run, leases, messages, counters, workers; and a shard's text form."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import FINISH
from nermill.worker.contracts.plan import SHA256, Options, Shard

MAX_ATTEMPTS = 3  # tries of a whole shard before its documents are tried one by one
MAX_STRIKES = 2  # times that one document, alone, may end its worker before it is rejected
MAX_INDEX = 1 << 62  # of a document; parts hold it in 64 bits


class RunState(str, Enum):
    """State of a run in the ledger.

    ``OPEN``: a stream that still grows. ``CLOSED``: all its shards are known. ``FINISHING``: all are recorded, or a
    producer saw all parts, and the run's last step is due. ``FINISHED``: ``_SUCCESS`` is written. ``CANCELLED``: what
    was not leased is not served.
    """

    OPEN = "open"
    CLOSED = "closed"
    FINISHING = "finishing"
    FINISHED = "finished"
    CANCELLED = "cancelled"


TRANSITIONS: dict[RunState, tuple[RunState, ...]] = {
    RunState.OPEN: (RunState.CLOSED, RunState.CANCELLED),
    RunState.CLOSED: (RunState.OPEN, RunState.FINISHING, RunState.CANCELLED),
    RunState.FINISHING: (RunState.OPEN, RunState.CLOSED, RunState.FINISHED, RunState.CANCELLED),
    RunState.FINISHED: (RunState.OPEN, RunState.CLOSED),
    RunState.CANCELLED: (RunState.OPEN, RunState.CLOSED),
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased shard, or the leased last step of a run: what to do, and the id that proves the lease.

    Attributes:
        shard: The shard; None for the run's last step.
        lease: Random id of the lease.
        attempts: How often it was leased, this time included.
        waited: How long it had waited, in seconds.
        fresh_until: Time by ``time.monotonic`` until which half of the lease is left at least, so that nobody else can
            have been given it.
        packed: Size, in the ledger, of documents that were sent by value and are not in the run's folder; 0 for none.
    """

    run_id: str
    uri: str
    options: Options
    shard: Shard | None
    lease: str
    attempts: int
    waited: float
    fresh_until: float
    packed: int = 0

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.uri)

    @property
    def key(self) -> str:
        """The shard's number as the ledger names it."""
        return FINISH if self.shard is None else str(self.shard.index)


@dataclass(frozen=True, slots=True)
class Message:
    """A Celery message to send: one shard (or the last step, where ``shard`` is None) of a run, on a queue."""

    queue: str
    run_id: str
    uri: str
    shard: int | None
    priority: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A run's counters. Documents and tokens are those of recorded shards; times are Unix seconds or 0.

    Attributes:
        planned: Shards that were sent; by value, all of the run.
        pending: Shards without a message.
        sent: Shards whose message was sent and which no worker began.
        leased: Shards that a worker holds.
        leased_tokens: Their tokens, of those shards whose worker renewed its lease since it tokenized them.
        leased_computed: How many of those are computed.
        blocked: Whether the run is not served until it is sent again or a shard of it is recorded; ``last_error`` says
            why.
        quarantined: Shards that are not served until they are sent again; ``last_error`` is the last one's reason.
        scores: Of a run by value that was evaluated, as JSON.
    """

    state: str = "unknown"
    submitted: int = 0
    ok: int = 0
    rejected: int = 0
    tokens: int = 0
    computed: int = 0
    redeliveries: int = 0
    duplicates: int = 0
    blocked: int = 0
    quarantined: int = 0
    pending: int = 0
    sent: int = 0
    leased: int = 0
    done: int = 0
    planned: int = 0
    leased_tokens: int = 0
    leased_computed: int = 0
    started: float = 0.0
    finished: float = 0.0
    artifact: str = ""
    last_error: str = ""
    scores: str = ""

    @property
    def waiting(self) -> int:
        """Shards that no worker began."""
        return self.pending + self.sent

    @property
    def unfinished_documents(self) -> int:
        """Documents that were sent and are not committed: what back-pressure looks at."""
        return self.submitted - self.ok - self.rejected


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A live worker process.

    Attributes:
        name: As in the statistics of its parts.
        device: ``cpu``, ``cuda:N`` or ``npu:N``, as seen from outside.
        model: Name of the artifact that it serves.
        artifact: Its sha256.
    """

    name: str
    device: str
    model: str
    artifact: str


@dataclass(frozen=True, slots=True)
class Completion:
    """``newly`` is False for a duplicate; ``last`` says that the run's last step is due now."""

    newly: bool
    last: bool


def lease_of(claim: Claim) -> tuple[str, str, str]:
    """The arguments that name a lease in the steps of the ledger."""
    return claim.run_id, claim.key, claim.lease


def shard_entry(shard: Shard) -> str:
    """A shard as the ledger keeps it."""
    return f"{shard.documents} {shard.first} {shard.sha256}"


def parse_shard(index: int, spec: str) -> Shard:
    """The shard of an entry.

    Raises:
        ValueError: the entry does not fit the contract.
    """
    documents, first, sha256 = spec.split(" ")
    if index < 0 or int(documents) <= 0 or not 0 <= int(first) < MAX_INDEX or not SHA256.fullmatch(sha256):
        raise ValueError("shard number, size or hash")
    return Shard(index, int(first), int(documents), sha256)
