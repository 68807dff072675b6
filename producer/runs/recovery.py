"""What a process that is gone left half done: an open run, or a compaction between two renames."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace

from nermill.producer.runs.queue import Queue
from nermill.producer.sources.live import Position
from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.plan import Plan, Shard
from nermill.worker.contracts.store import store_errors

BEFORE = "before"  # what a run's folder is called beside its place until the compacted one is there


def recover(run: RunFolder, plan: Plan, queue: Queue) -> Plan:
    """The plan of an open run as its folder tells it; closed for good where its producer is gone.

    Raises:
        StoreError: a shard cannot be read.
    """
    shards, _ = durable_shards(run)
    if queue.has_producer(plan.run_id):
        return replace(plan, shards=tuple(shards))
    plan = closed(plan, shards)
    plan.write(run)
    return plan


def durable_shards(run: RunFolder) -> tuple[list[Shard], Position | None]:
    """The shards in a stream's folder, and how far they reach in its input, where they say so.

    Raises:
        StoreError: a shard cannot be read.
    """
    shards: list[Shard] = []
    first, position = 0, None
    for index in sorted(run.shards()):
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


def closed(plan: Plan, shards: list[Shard]) -> Plan:
    """The plan of a stream that ended."""
    documents = sum(shard.documents for shard in shards)
    inputs = tuple(replace(entry, documents=documents) for entry in plan.inputs)
    return replace(plan, shards=tuple(shards), inputs=inputs, is_open=False)


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
