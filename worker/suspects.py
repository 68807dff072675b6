"""A shard that outlived its attempts is tried in groups, each named in the ledger first, so that a crash has a culprit.

A group that crashed its worker is tried document by document the next time; a document that crashed it alone,
``MAX_STRIKES`` times, is rejected unseen. Two crashes alone are asked for because a process may die of something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from worker.contracts.ledger import MAX_STRIKES

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
