"""Documents that could not be tagged: their list, and another try."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nermill.producer.compact import take_up
from nermill.producer.queue import Queue
from nermill.producer.run import send
from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import REJECT_FOLDER, REPORT_HTML, REPORT_JSON, SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.plan import Plan

WORTH_A_RETRY = ("model_failure", "crashed_worker")  # the other reasons lie in the document itself


def read_rejects(run: RunFolder, plan: Plan) -> Iterator[dict[str, Any]]:
    """The rejects of the committed parts, in the order of the input.

    Raises:
        StoreError: a file of rejects cannot be read.
    """
    for shard in _shards_with_rejects(run, plan):
        yield from _rows(run, shard)


def retry(run: RunFolder, plan: Plan, queue: Queue) -> tuple[int, int]:
    """Sends the shards again that hold rejects worth another try; their parts are taken away first.

    Returns:
        Rejects that are tried again, and those that are not because the fault is the document's own.
    """
    plan = take_up(run) or plan
    again, own_fault, shards = 0, 0, []
    for shard in _shards_with_rejects(run, plan):
        hopeful = sum(row["reason"] in WORTH_A_RETRY for row in _rows(run, shard))
        own_fault += sum(1 for _ in _rows(run, shard)) - hopeful
        if hopeful:
            again += hopeful
            shards.append(shard)
    if shards:
        for name in (SUCCESS_FILE, REPORT_JSON, REPORT_HTML):
            run.remove(name)
        for shard in shards:
            run.remove(part_name(shard))
            run.remove(run.reject_file(shard))
        send(run, plan, queue)
    return again, own_fault


def _shards_with_rejects(run: RunFolder, plan: Plan) -> list[int]:
    names = set(run.list(REJECT_FOLDER))
    committed = run.committed()
    return [s.index for s in plan.shards if part_name(s.index) in names and s.index in committed]


def _rows(run: RunFolder, shard: int) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet as pq

    name = run.reject_file(shard)
    try:
        return list(pq.read_table(pa.BufferReader(run.read(name))).to_pylist())
    except pa.ArrowInvalid as error:
        raise StoreError(f"{run.path(name)}: damaged ({error}); remove it and its part, then nermill resume") from None
