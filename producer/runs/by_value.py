"""Runs by value: the producer reaches the broker, and need not see the run's folder, which the workers fill."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, NamedTuple

from nermill.producer.runs.planning import (
    Request,
    details_of_input,
    find_inputs,
    model_identity,
    plan_of_input,
    planned_run_id,
)
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import MAX_WAITING_SHARDS, OnStatus, check_served, ignore, lost, open_run
from nermill.producer.runs.shards import group_documents
from nermill.producer.runs.status import look
from nermill.producer.sources.files import absolute
from nermill.producer.sources.options import OnError
from nermill.producer.sources.reading import OnRead, Reading, ignore_progress
from nermill.worker.contracts.by_value import Documents, Held, TooLargeError, pack
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import BY_VALUE, Plan, Shard
from nermill.worker.contracts.shard import shard_table

HELD_BYTES = 64 << 20  # of documents in Redis, of all runs, above which a producer waits
_OWN_SHARE = 8  # a run may have this part of them whatever other runs have, so that none is kept out
_MEMORY_SHARE = 4  # no more than this part of the server's limit of memory
_BATCH = 64  # shards offered between two looks at which messages are due
_POLL_SECONDS = 0.2


class _Entry(NamedTuple):
    """A shard's documents in the temporary file, and how many of them cannot be tagged."""

    shard: Shard
    start: int
    size: int
    rejected: int


FindQueue = Callable[[], Queue | None]


@dataclass(frozen=True)
class Packed:
    """A run that was read and not sent.

    Attributes:
        run: The run's folder, which is not looked at.
        plan: Its open plan, without shards.
        shards: Its shards, in order.
        spool: Their documents, one after another.
    """

    run: RunFolder
    plan: Plan
    shards: list[_Entry]
    spool: IO[bytes]


@contextmanager
def packed(request: Request, on_read: OnRead = ignore_progress) -> Iterator[Packed]:
    """Reads a run's input to its end, into a temporary file of this machine; nothing is sent.

    Args:
        request: What to send; ``out`` is a folder or URI as the workers see it.
        on_read: Told now and then how far the reading is.

    Raises:
        UsageError: a wrong input.
    """
    request = replace(request, by_value=True)
    model = model_identity(request.model, request.options)
    found = find_inputs(request)
    out = absolute(request.out)
    run_id = planned_run_id(out, request, model, found.sources, found.prints)
    reading = Reading(found.sources, [size for _, size in found.prints], request.read, on_read)
    with tempfile.TemporaryFile() as spool:
        shards = list(_spooled(reading, request, spool))
        details = {BY_VALUE: True, **details_of_input(found, sum(entry.rejected for entry in shards))}
        plan = replace(plan_of_input(request, run_id, model, found, reading), is_open=True, details=details)
        yield Packed(RunFolder(f"{out}/run={run_id}"), plan, shards, spool)


def send(run: Packed, queue: Queue, on_wait: OnStatus = ignore) -> None:
    """Sends the shards of a run that are neither recorded nor in Redis; waits while too much lies there.

    Args:
        run: The run.
        queue: The broker.
        on_wait: Told the status while sending waits.

    Raises:
        UsageError: the broker has the run with other shards.
        StoreError: the workers refuse the run.
        BrokerError: the broker does not answer, or lost the run.
    """
    plan = run.plan
    with queue.ledger() as ledger:
        Documents(ledger).open(run.run.uri, plan)
        declared = Documents(ledger).declare(plan.run_id, [entry.shard for entry in run.shards])
        if declared == "unknown":
            raise lost(run.run)
        if declared == "another":
            raise UsageError(
                f"run {plan.run_id}: the broker has it with other shards, as another version of nermill cuts them; "
                "name another --out"
            )
        needed = Documents(ledger).needed(plan.run_id)
    _offer(run, queue, [entry for entry in run.shards if entry.shard.index in needed], on_wait)
    with queue.ledger() as ledger:
        ledger.seal(plan.run_id)
    queue.promote()


def _spooled(reading: Reading, request: Request, spool: IO[bytes]) -> Iterator[_Entry]:
    index = first = start = 0
    for group in group_documents(reading.documents(), request.limits):
        for data, sha256, documents in pack_group(group, request.read.on_error):
            spool.write(data)
            yield _Entry(Shard(index, first, len(documents), sha256), start, len(data), number_of_faults(documents))
            index, first, start = index + 1, first + len(documents), start + len(data)


def number_of_faults(documents: list[Document]) -> int:
    """How many of the documents cannot be tagged."""
    return sum(document.fault is not None for document in documents)


def pack_group(group: list[Document], on_error: OnError) -> Iterator[tuple[bytes, str, list[Document]]]:
    """Packs documents as one shard, or as several where they are too large for one.

    Yields:
        Bytes, their sha256, and documents of each shard; one that is too large by itself is a reject.

    Raises:
        UsageError: one document is too large, and wrong records are not rejected.
    """
    try:
        yield (*pack(shard_table(group)), group)
    except TooLargeError as error:
        if len(group) > 1:
            middle = len(group) // 2
            yield from pack_group(group[:middle], on_error)
            yield from pack_group(group[middle:], on_error)
            return
        (document,) = group
        told = f"{error}; submit it without --by-value"
        if on_error == "fail" or document.fault is not None:
            raise UsageError(f"{document.id[:80]}: {told}") from None
        yield from pack_group([Document(document.id, fault=Fault("too_large", told))], on_error)


def _offer(run: Packed, queue: Queue, shards: list[_Entry], on_wait: OnStatus) -> None:
    limit = byte_limit(queue)
    for number, (shard, start, size, _) in enumerate(shards):
        run.spool.seek(start)
        data = run.spool.read(size)
        with queue.ledger() as ledger:
            state, held = Documents(ledger).offer(run.plan.run_id, shard, data)
        if state == "unknown":
            raise lost(run.run)
        if state == "cancelled":
            return
        if number % _BATCH == 0:
            queue.promote()
        if not has_room(held, limit) or number % _BATCH == 0:
            _await_room(run, queue, limit, on_wait)


def byte_limit(queue: Queue) -> int:
    """Bytes of documents by value, of all runs, above which a producer waits."""
    memory = queue.max_memory()
    return min(HELD_BYTES, memory // _MEMORY_SHARE) if memory else HELD_BYTES


def has_room(held: Held, limit: int) -> bool:
    """Whether a run's producer may send more documents by value."""
    return held.total <= limit or held.own <= limit // _OWN_SHARE


def _await_room(run: Packed, queue: Queue, limit: int, on_wait: OnStatus) -> None:
    while True:
        with queue.ledger() as ledger:
            held, progress = Documents(ledger).held(run.plan.run_id), ledger.progress(run.plan.run_id)
        if has_room(held, limit) and progress.waiting <= MAX_WAITING_SHARDS:
            return
        status = look(run.run, run.plan, queue)
        check_served(run.run, run.plan, status.progress)
        on_wait(status)
        queue.recover()
        time.sleep(_POLL_SECONDS)


def open_seen_or_not(uri: str, find_queue: FindQueue) -> tuple[RunFolder, Plan]:
    """A run, by its folder or, where that is not to be seen from here and the run goes by value, by the ledger.

    Args:
        uri: The run's folder or URI.
        find_queue: Asked where the folder does not tell; None where no broker answers.

    Raises:
        UsageError, StoreError: there is no such run here, nor in the ledger.
    """
    try:
        return open_run(uri)
    except (UsageError, StoreError):
        queue = find_queue() if "/run=" in uri else None
        plan = find_by_value(absolute(uri), queue) if queue is not None else None
        if plan is None:
            raise
        return RunFolder(absolute(uri)), plan


def find_by_value(folder: str, queue: Queue) -> Plan | None:
    """The plan, without shards, of the run by value that goes to a folder; None where the ledger knows none."""
    _, _, run_id = folder.rpartition("/run=")
    with queue.ledger() as ledger:
        plan = Documents(ledger).plan(run_id)
        return plan if plan is not None and ledger.uri(run_id) == folder else None
