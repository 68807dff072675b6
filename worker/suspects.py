"""A shard that outlived its attempts is tried in groups, each named in the ledger first, so that a crash has a culprit.

A group that crashed its worker is tried document by document the next time; a document that crashed it alone,
``MAX_STRIKES`` times, is rejected unseen. Two crashes alone are asked for because a process may die of something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import pyarrow as pa

from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.errors import LeaseLostError
from nermill.worker.contracts.ledger import MAX_STRIKES, Claim, Ledger
from nermill.worker.pipeline import Annotated, Pipeline

GROUPS = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows ``start`` to ``end`` of a shard, tried at once.

    Attributes:
        start, end: The rows.
        name: What the ledger remembers a crash under: a document's index, or a negative number for a group.
        is_condemned: A single document that is not tried any more.
    """

    start: int
    end: int
    name: int
    is_condemned: bool = False


def trials(first: int, count: int, strikes: dict[int, int]) -> Iterator[Trial]:
    """How to try a shard, given the crashes so far.

    Args:
        first: ``doc_index`` of the shard's first row.
        count: Its rows.
        strikes: Crashes by name of the trial.

    Yields:
        Trials that cover every row once, in order.
    """
    size = max(1, -(-count // GROUPS))
    for start in range(0, count, size):
        end = min(start + size, count)
        group = -(first + start) - 1
        if size > 1 and not strikes.get(group):
            yield Trial(start, end, group)
            continue
        for row in range(start, end):
            yield Trial(row, row + 1, first + row, strikes.get(first + row, 0) >= MAX_STRIKES)


def annotate_in_trials(pipeline: Pipeline, ledger: Ledger, claim: Claim, table: pa.Table) -> Annotated:
    """Tags a shard that outlived its attempts in trials that the ledger knows.

    Args:
        pipeline: The model, which nobody else may use meanwhile.
        ledger: Where trials are named and strikes are counted.
        claim: The shard.
        table: Its documents, with the SHARD schema.

    Raises:
        EngineError: the device failed for good; no document is to blame.
        LeaseLostError: another worker has the shard.
    """
    first = claim.shard.first
    tagged, stats = [], []
    faults: dict[int, Fault] = {}
    for trial in trials(first, table.num_rows, ledger.strikes(claim.run_id)):
        documents = table.slice(trial.start, trial.end - trial.start)
        if trial.is_condemned:
            documents = _condemned(documents)
        elif not ledger.probe(claim, trial.name):
            raise LeaseLostError
        annotated = pipeline.annotate(documents, claim.options, first + trial.start)
        tagged.append(annotated.part)
        faults |= {trial.start + row: fault for row, fault in annotated.faults.items()}
        stats.append(annotated.stats)
    ledger.probe(claim, None)  # what may still go wrong is no document's fault
    return Annotated(pa.concat_tables(tagged), faults, reduce(add, stats))


def _condemned(document: pa.Table) -> pa.Table:
    message = f"its worker died {MAX_STRIKES} times while it was tagged alone"
    row = {**document.to_pylist()[0], "fault_reason": "crashed_worker", "fault_message": message}
    return pa.Table.from_pylist([row], schema=document.schema)
