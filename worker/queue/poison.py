"""Isolation of poison documents: those that end the process that tags them.

A shard that was leased ``MAX_ATTEMPTS`` times without a result is tagged in *trials*, while nothing else is tagged in
the process. The ledger records each trial before it begins, so that a crash can be attributed to it; such a crash is a
*strike*. A group of documents with a strike is tagged document by document the next time. A single document with
``MAX_STRIKES`` strikes is rejected; one strike is not enough, since the process may have ended for another reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add

import pyarrow as pa

from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.errors import LeaseLostError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.plan import Shard
from nermill.worker.contracts.records import MAX_STRIKES, Claim
from nermill.worker.tagging.pipeline import Annotated, Pipeline

GROUPS = 8


class Isolation:
    """A readers-writer lock: shared or exclusive; a thread that waits for exclusive access precedes later sharers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock together with other sharers for the time of the ``with`` block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until the lock is free, and holds it exclusively for the time of the ``with`` block."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._inside)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Trial:
    """Consecutive rows of a shard that are tagged in one call.

    Attributes:
        start, end: The rows, half-open.
        name: Key of its strikes in the ledger: ``doc_index`` of the first document, ``-``, that of the last.
        is_poison: Whether it is a single document that is rejected without another try.
    """

    start: int
    end: int
    name: str
    is_poison: bool = False


def trials(first: int, count: int, strikes: Mapping[str, int]) -> Iterator[Trial]:
    """Divides a shard into trials.

    Args:
        first: ``doc_index`` of the shard's first row.
        count: Number of rows.
        strikes: Number of strikes by the trial's name.

    Yields:
        Trials that cover every row once, in order.
    """
    size = max(1, -(-count // GROUPS))
    for start in range(0, count, size):
        end = min(start + size, count)
        group = _name(first + start, first + end)
        if size > 1 and not strikes.get(group):
            yield Trial(start, end, group)
            continue
        for row in range(start, end):
            name = _name(first + row, first + row + 1)
            yield Trial(row, row + 1, name, strikes.get(name, 0) >= MAX_STRIKES)


def _name(start: int, end: int) -> str:
    return f"{start}-{end - 1}"


def annotate_in_trials(pipeline: Pipeline, ledger: Ledger, claim: Claim, shard: Shard, table: pa.Table) -> Annotated:
    """Tags a shard in trials, each recorded in the ledger.

    Args:
        pipeline: The model; no other thread may use it meanwhile.
        ledger: Records trials and counts strikes.
        claim: The lease.
        shard: The leased shard.
        table: Its documents, with the SHARD schema.

    Raises:
        EngineError: the device failed for good; no document is the cause.
        LeaseLostError: another worker has the shard's lease.
    """
    tagged, stats = [], []
    faults: dict[int, Fault] = {}
    for trial in trials(shard.first, table.num_rows, ledger.strikes(claim.run_id)):
        documents = table.slice(trial.start, trial.end - trial.start)
        if trial.is_poison:
            documents = _as_fault(documents)
        elif not ledger.probe(claim, trial.name):
            raise LeaseLostError
        annotated = pipeline.annotate(documents, claim.options, shard.first + trial.start)
        tagged.append(annotated.part)
        faults |= {trial.start + row: fault for row, fault in annotated.faults.items()}
        stats.append(annotated.stats)
    ledger.probe(claim, None)  # a crash from here on is no strike
    return Annotated(pa.concat_tables(tagged), faults, reduce(add, stats))


def _as_fault(document: pa.Table) -> pa.Table:
    message = f"its worker died {MAX_STRIKES} times while it was tagged alone"
    row = {**document.to_pylist()[0], "fault_reason": "crashed_worker", "fault_message": message}
    return pa.Table.from_pylist([row], schema=document.schema)
