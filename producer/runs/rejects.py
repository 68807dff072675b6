"""Documents that could not be tagged: their list, and another try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nermill.producer.runs.compact import finish_interrupted_swap
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send, unmark
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import read_rejects as rejects_of
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.contracts.records import RunState

WORTH_A_RETRY = ("model_failure", "crashed_worker")  # the other reasons lie in the document itself


class Retry(NamedTuple):
    """Numbers of rejects.

    Attributes:
        again: Those that are tried again.
        own_fault: Those that are not because the fault is the document's own.
        at_work: Those that are not because their shard waits or is at work.
    """

    again: int
    own_fault: int
    at_work: int


def read_rejects(run: RunFolder, plan: Plan) -> Iterator[dict[str, Any]]:
    """The rejected documents of the committed parts, in the order of the input.

    Raises:
        StoreError: a part cannot be read.
    """
    for _, table in rejects_of(run, _committed(run, plan)):
        yield from table.to_pylist()


def retry(run: RunFolder, plan: Plan, queue: Queue, on_wait: Callable[[], object] = lambda: None) -> Retry:
    """Sends the shards again that hold rejects worth another try; their parts are taken away first.

    Shards that wait or are at work are left as they are: who has one may be about to record the part that is there.

    Args:
        run: The run's folder.
        plan: Its plan.
        queue: Its broker.
        on_wait: Called every 0.5 s while a worker is at the run's last step.

    Raises:
        UsageError: another producer may change the run.
        StoreError: a part cannot be read, or another producer may have changed the run while this one did nothing.
        BrokerError: the broker does not answer.
    """
    plan = finish_interrupted_swap(run) or plan
    found, shards = _worth_a_retry(run, plan, queue)
    if not shards:
        return found
    try:
        plan, found = _take_parts_away(run, plan, queue, on_wait)
    except BaseException:
        queue.seal(plan.run_id)  # what was recorded meanwhile made no last step due
        raise
    send(run, plan, queue)
    return found


def _take_parts_away(run: RunFolder, plan: Plan, queue: Queue, on_wait: Callable[[], object]) -> tuple[Plan, Retry]:
    """Removes the marks of a run and the parts with rejects; nobody marks the run meanwhile."""
    with queue.held(plan.run_id, run.uri) as prove:

        def wait() -> None:
            prove()
            on_wait()

        queue.reopen(plan.run_id, RunState.CLOSED, wait)
        plan = read_plan(run)  # the run's last step may have taken a while
        found, shards = _worth_a_retry(run, plan, queue, prove)
        prove()
        if shards:
            unmark(run)
        for shard in shards:
            prove()
            run.remove(part_name(shard))
            with queue.ledger() as ledger:
                ledger.forget(plan.run_id, shard)
    return plan, found


def _worth_a_retry(
    run: RunFolder, plan: Plan, queue: Queue, before_each: Callable[[], object] = lambda: None
) -> tuple[Retry, list[int]]:
    """How many rejects are worth another try, and the shards of those that can be tried now."""
    again = own_fault = waits = 0
    shards = []
    with queue.ledger() as ledger:
        at_work = ledger.at_work(plan.run_id)
    for shard, table in rejects_of(run, _each(_committed(run, plan), before_each)):
        reasons = table["reason"].to_pylist()
        hopeful = sum(reason in WORTH_A_RETRY for reason in reasons)
        own_fault += len(reasons) - hopeful
        if shard in at_work:
            waits += hopeful
        elif hopeful:
            again += hopeful
            shards.append(shard)
    return Retry(again, own_fault, waits), shards


def _each(shards: list[int], before_each: Callable[[], object]) -> Iterator[int]:
    for shard in shards:
        before_each()
        yield shard


def _committed(run: RunFolder, plan: Plan) -> list[int]:
    committed = run.committed()
    return [shard.index for shard in plan.shards if shard.index in committed]
