"""Documents that could not be tagged: their list, and another try."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nermill.producer.runs.compact import finish_interrupted_swap
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send
from nermill.worker.contracts.layout import REJECT_FILE, REPORT_HTML, REPORT_JSON, SUCCESS_FILE, RunFolder, part_name
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


def retry(run: RunFolder, plan: Plan, queue: Queue) -> tuple[int, int]:
    """Sends the shards again that hold rejects worth another try; their parts are taken away first.

    Returns:
        Rejects that are tried again, and those that are not because the fault is the document's own.
    """
    plan = finish_interrupted_swap(run) or plan
    again, own_fault, shards = _worth_a_retry(run, plan)
    if not shards:
        return 0, own_fault
    queue.reopen(plan.run_id, RunState.CLOSED)
    plan = read_plan(run)  # its last step may have taken a while
    again, own_fault, shards = _worth_a_retry(run, plan)
    if shards:
        for name in (SUCCESS_FILE, REPORT_JSON, REPORT_HTML, REJECT_FILE):
            run.remove(name)
        for shard in shards:
            run.remove(part_name(shard))
    send(run, plan, queue)
    return again, own_fault


def _worth_a_retry(run: RunFolder, plan: Plan) -> tuple[int, int, list[int]]:
    """Rejects that are worth another try, those that are not, and the shards of the former."""
    again, own_fault, shards = 0, 0, []
    for shard, table in rejects_of(run, _committed(run, plan)):
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
