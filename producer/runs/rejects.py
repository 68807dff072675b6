"""Documents that could not be tagged: their list, and another try."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from nermill.producer.runs.compact import finish_interrupted_swap
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send, unmark
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import read_rejects as rejects_of
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.contracts.records import RunState

WORTH_A_RETRY = ("model_failure", "crashed_worker")  # the other reasons lie in the document itself


def read_rejects(run: RunFolder, plan: Plan) -> Iterator[dict[str, Any]]:
    """The rejected documents of the committed parts, in the order of the input.

    Raises:
        StoreError: a part cannot be read.
    """
    for _, table in rejects_of(run, _committed(run, plan)):
        yield from table.to_pylist()


def retry(run: RunFolder, plan: Plan, queue: Queue, on_wait: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Sends the shards again that hold rejects worth another try; their parts are taken away first.

    Shards that wait or are at work are left as they are: who has one may be about to record the part that is there.

    Args:
        run: The run's folder.
        plan: Its plan.
        queue: Its broker.
        on_wait: Called every 0.5 s while a worker is at the run's last step.

    Returns:
        Rejects that are tried again, and those that are not because the fault is the document's own.

    Raises:
        UsageError: another producer may change the run.
        StoreError: a part cannot be read.
        BrokerError: the broker does not answer.
    """
    plan = finish_interrupted_swap(run) or plan
    again, own_fault, shards = _worth_a_retry(run, plan, queue)
    if not shards:
        return 0, own_fault
    if plan.is_open:  # nobody marks it before its end
        for shard in shards:
            run.remove(part_name(shard))
    else:
        plan, again, own_fault = _take_parts_away(run, plan, queue, on_wait)
    send(run, plan, queue)
    return again, own_fault


def _take_parts_away(run: RunFolder, plan: Plan, queue: Queue, on_wait: Callable[[], object]) -> tuple[Plan, int, int]:
    """Removes the marks of a run and the parts with rejects; nobody marks the run meanwhile."""
    holder = uuid.uuid4().hex

    def hold() -> None:
        if not queue.hold_stream(plan.run_id, holder):
            raise UsageError(f"{run.uri}: another producer may change this run; end that one first")

    def wait() -> None:
        hold()
        on_wait()

    hold()
    try:
        queue.reopen(plan.run_id, RunState.CLOSED, wait)
        plan = read_plan(run)  # the run's last step may have taken a while
        again, own_fault, shards = _worth_a_retry(run, plan, queue)
        if shards:
            hold()
            unmark(run)
        for shard in shards:
            hold()
            run.remove(part_name(shard))
    finally:
        queue.leave_stream(plan.run_id, holder)
    return plan, again, own_fault


def _worth_a_retry(run: RunFolder, plan: Plan, queue: Queue) -> tuple[int, int, list[int]]:
    """Rejects that are worth another try, those that are not, and the shards of the former."""
    again, own_fault, shards = 0, 0, []
    with queue.ledger() as ledger:
        at_work = ledger.at_work(plan.run_id)
    for shard, table in rejects_of(run, [shard for shard in _committed(run, plan) if shard not in at_work]):
        reasons = table["reason"].to_pylist()
        hopeful = sum(reason in WORTH_A_RETRY for reason in reasons)
        own_fault += len(reasons) - hopeful
        if hopeful:
            again += hopeful
            shards.append(shard)
    return again, own_fault, shards


def _committed(run: RunFolder, plan: Plan) -> list[int]:
    committed = run.committed()
    return [shard.index for shard in plan.shards if shard.index in committed]
