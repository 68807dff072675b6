"""Isolation of poison documents: those that end the process that tags them.

A shard that was leased ``MAX_ATTEMPTS`` times without a result is tagged in trials, with nothing else in the process.
The ledger notes each trial before it begins, so that a crash is attributed to it: a group of documents that ended its
worker is tagged document by document the next time, and a document that did so alone ``MAX_STRIKES`` times is
rejected without another try. Two strikes are asked for because a process may end for another reason.
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
from nermill.worker.contracts.ledger import MAX_STRIKES, Claim, Ledger
from nermill.worker.contracts.plan import Shard
from nermill.worker.tagging.pipeline import Annotated, Pipeline

GROUPS = 8


class Isolation:
    """A lock that many hold together, or one alone; whoever waits to be alone goes before newcomers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock together with others."""
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
        """Holds the lock alone, once all others have left."""
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
    """Rows ``start`` to ``end`` of a shard, tagged at once.

    Attributes:
        start, end: The rows, half-open.
        name: What the ledger counts its strikes under: ``doc_index`` of the first document, ``-``, that of the last.
        is_poison: A single document that is not tagged any more.
    """

    start: int
    end: int
    name: str
    is_poison: bool = False


def trials(first: int, count: int, strikes: Mapping[str, int]) -> Iterator[Trial]:
    """How to tag a shard in trials, given the strikes so far.

    Args:
        first: ``doc_index`` of the shard's first row.
        count: Its rows.
        strikes: Strikes by name of the trial.

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
    """Tags a shard in trials that the ledger knows.

    Args:
        pipeline: The model, which nobody else may use meanwhile.
        ledger: Where trials are noted and strikes are counted.
        claim: The lease.
        shard: What is leased.
        table: Its documents, with the SHARD schema.

    Raises:
        EngineError: the device failed for good; no document is to blame.
        LeaseLostError: another worker has the shard.
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
    ledger.probe(claim, None)  # what may go wrong from here on is no document's fault
    return Annotated(pa.concat_tables(tagged), faults, reduce(add, stats))


def _as_fault(document: pa.Table) -> pa.Table:
    message = f"its worker died {MAX_STRIKES} times while it was tagged alone"
    row = {**document.to_pylist()[0], "fault_reason": "crashed_worker", "fault_message": message}
    return pa.Table.from_pylist([row], schema=document.schema)
