"""What a process that is gone left half done: an open run, or a compaction between two renames."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

from nermill.producer.runs.queue import Queue
from nermill.producer.sources.live import Position
from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.plan import Plan, Shard
from nermill.worker.contracts.records import RunState
from nermill.worker.contracts.store import store_errors

BEFORE = "before"  # what a run's folder is called beside its place until the compacted one is there


def recover(run: RunFolder, plan: Plan, queue: Queue) -> Plan:
    """The plan of an open run as its folder tells it; closed for good where its producer is gone.

    Raises:
        StoreError: a shard cannot be read, or another producer may have changed the run meanwhile.
    """
    if queue.has_producer(plan.run_id):
        return replace(plan, shards=tuple(durable_shards(run)[0]))
    with queue.held(plan.run_id, run.uri) as prove:
        closed = plan.closed(durable_shards(run, prove)[0])  # what the producer wrote until it was gone
        prove()
        closed.write(run)
        try:
            prove()
        except StoreError:
            plan.write(run)  # of another producer, which may have gone on before that
            raise
    return closed


def recover_by_value(run: RunFolder, plan: Plan, queue: Queue) -> Plan:
    """Closes a stream by value whose producer is gone; what the workers refused of it is sent again.

    Raises:
        UsageError: the broker does not know it, or lacks documents of it.
    """
    if queue.has_producer(plan.run_id):
        return plan
    with queue.ledger() as ledger:
        documents, state = Documents(ledger), ledger.progress(plan.run_id).state
        if state == "unknown":
            raise UsageError(f"{run.uri}: the broker lost this stream; send what is not acknowledged as another one")
        if state in (RunState.OPEN, RunState.CANCELLED) and (gone := len(documents.needed(plan.run_id))):
            raise UsageError(
                f"{run.uri}: the documents of {gone} of its shards are not there any more; "
                f"give the same input again: nermill submit - --by-value --resume {run.uri}"
            )
        if state == RunState.FINISHED:
            return plan
        documents.open(run.uri, plan)
        ledger.add(plan.run_id, documents.shards(plan.run_id))
    queue.end_stream(plan.run_id)
    queue.promote()
    return replace(plan, cancelled=False)


def durable_shards(
    run: RunFolder, before_each: Callable[[], object] = lambda: None
) -> tuple[list[Shard], Position | None]:
    """The shards in a stream's folder, and how far they reach in its input, where they say so.

    Args:
        run: The run's folder.
        before_each: Called before each shard is read.

    Raises:
        StoreError: a shard cannot be read.
    """
    shards: list[Shard] = []
    first, position = 0, None
    indices = sorted(run.shards())
    if indices:  # its writer may have ended before the sync; each earlier one was synced before the next was written
        run.sync(run.shard_file(indices[-1]))
    for index in indices:
        before_each()
        data = run.read(run.shard_file(index))
        documents, position = _look_into(data, run.path(run.shard_file(index)))
        shards.append(Shard(index, first, documents, hashlib.sha256(data).hexdigest()))
        first += documents
    return shards, position


def _look_into(data: bytes, name: str) -> tuple[int, Position | None]:
    """Documents of a shard, and the place behind it in its stream's input."""
    import pyarrow as pa
    from pyarrow import ipc

    try:
        table = ipc.open_file(pa.BufferReader(data)).read_all()
        return table.num_rows, Position.of_metadata(table.schema.metadata)
    except (pa.ArrowInvalid, TypeError, ValueError) as error:
        raise StoreError(f"{name}: not a shard ({error})") from None


def beside(run: RunFolder, name: str) -> str:
    """Path of a hidden folder beside a run on a local disk."""
    folder, base = os.path.split(os.path.abspath(run.uri))
    return f"{folder}/.{base}.{name}"


def finish_swap(run: RunFolder) -> None:
    """Ends the swap of a local run's folder that was interrupted: the new one is in its place, or the old one again.

    Raises:
        StoreError: the disk refuses.
    """
    before = beside(run, BEFORE)
    if not run.is_local or not os.path.exists(before):
        return
    with store_errors("put back", before):
        if run.exists(PLAN_FILE):
            shutil.rmtree(before)
        else:
            os.rename(before, run.uri)
