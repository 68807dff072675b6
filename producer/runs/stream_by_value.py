"""A stream by value: documents travel through the broker, and are durable once a worker has stored them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from nermill.producer.runs.base_stream import BaseStream, Group
from nermill.producer.runs.by_value import byte_limit, has_room, number_of_faults, pack_group
from nermill.producer.runs.continuation import Durable
from nermill.producer.runs.run import BROKER_TIMEOUT, check_served, is_much
from nermill.producer.runs.shards import ANOTHER_PRODUCER
from nermill.producer.sources.files import absolute
from nermill.producer.sources.live import Position
from nermill.producer.sources.options import OnError
from nermill.worker.contracts.by_value import Documents, Held
from nermill.worker.contracts.errors import BrokerError, StoreError
from nermill.worker.contracts.plan import BY_VALUE, Shard
from nermill.worker.contracts.records import RunState


class _Packed(NamedTuple):
    """A shard that is not durable yet; ``sha256`` is that of ``documents``."""

    shard: Shard
    documents: bytes
    position: Position | None


class StreamByValue(BaseStream):
    """An open run whose documents travel through the broker; its folder is not looked at.

    What a worker has not stored yet is kept here, too, and sent again to a broker that lost it. ``add`` waits while
    the broker is away, and while too much lies in it.

    Args:
        arguments, options: As for BaseStream.
        durable: As for BaseStream.
        on_error: What becomes of a document that is too large: a reject, or ``failure``.
    """

    details: ClassVar[dict[str, Any]] = {BY_VALUE: True}

    def __init__(
        self, *arguments: Any, on_error: OnError = "reject", durable: Durable | None = None, **options: Any
    ) -> None:
        self._on_error, self._position = on_error, durable.position if durable else None
        self._unsent: deque[_Packed] = deque()
        self._offered: deque[_Packed] = deque()
        self._held, self._is_much = Held(0, 0), False
        self._answered = time.monotonic()
        super().__init__(*arguments, durable=durable, **options)

    def send_again(self) -> None:
        self._open_again()
        self._queue.end_stream(self.plan.run_id)

    def _checked(self, out: str) -> str:
        return absolute(out)

    def _open(self) -> None:
        self._limit = byte_limit(self._queue)
        self._end_of_packed = self._durable_documents(), len(self._shards)
        self._open_again()

    def _open_again(self) -> None:
        plan = self.plan
        with self._queue.ledger() as ledger:
            Documents(ledger).open(self.run.uri, plan, RunState.OPEN)
            if self._position is not None:  # before the shards, which are worth nothing without it
                Documents(ledger).place(plan.run_id, self._shards[-1].index, self._position.as_json())
            ledger.add(plan.run_id, reversed(self._shards))  # whoever goes on counts them from the first one
        with self._changed:
            self._unsent.extendleft(reversed(self._offered))
            self._offered.clear()
        self._queue.promote()

    def _is_lost(self) -> bool:
        with self._queue.ledger() as ledger:
            progress = ledger.progress(self.plan.run_id)
        return progress.state == "unknown" or progress.planned < len(self._shards) + len(self._offered)

    def _store(self, group: Group) -> None:
        packed, done = [], 0
        first, index = self._end_of_packed
        self.rejected -= number_of_faults(group.documents)
        for data, sha256, documents in pack_group(group.documents, self._on_error):
            done += len(documents)
            shard = Shard(index, first, len(documents), sha256)
            packed.append(_Packed(shard, data, group.positions[done - 1]))
            first, index = first + len(documents), index + 1
            self.rejected += number_of_faults(documents)
        self._end_of_packed = first, index
        with self._changed:
            self._full.popleft()
            self._unsent.extend(packed)
            self._untried += len(packed)
            self._changed.notify_all()

    def _is_waiting(self) -> bool:
        return self._is_held_back or not self._is_durable()

    def _is_durable(self) -> bool:
        return not (self._unsent or self._offered)

    def _send(self) -> None:
        if not self._is_waiting():
            return
        self._offer()
        self._take_durable()

    def _offer(self) -> None:
        """Gives the broker the documents that it has room for."""
        is_new = False
        while self._unsent and has_room(self._held, self._limit):
            shard, documents, position = packed = self._unsent[0]
            with self._queue.ledger() as ledger:
                state, self._held = Documents(ledger).offer(
                    self.plan.run_id,
                    shard,
                    documents,
                    position=position.as_json() if position else "",
                    holder=self._holder,
                )
            if state in ("not held", "unknown"):
                self._renew()
                return
            if state == "another":
                told = f"{ANOTHER_PRODUCER}, or its input is read with other options"
                raise StoreError(f"{self.run.uri}: shard {shard.index} was sent with other documents: {told}")
            self._check_open(state)
            is_new = True
            with self._changed:
                self._unsent.popleft()
                self._offered.append(packed)
        if is_new:
            self._queue.promote()

    def _check_open(self, state: str) -> None:
        if state != "open":
            raise StoreError(f"{self.run.uri}: the stream is {state}; this producer ends")

    def _take_durable(self) -> None:
        """Looks which shards are in the run's folder by now."""
        with self._queue.ledger() as ledger:
            documents, progress = Documents(ledger), ledger.progress(self.plan.run_id)
            shards = documents.durable(self.plan.run_id, self._offered[0].shard.index) if self._offered else []
            self._held = documents.held(self.plan.run_id)
        if progress.state != "unknown":
            self._check_open(progress.state)
        self._is_much = is_much(progress, self._high_water)
        for shard, (sent, _, position) in zip(shards, list(self._offered), strict=False):
            if (shard.first, shard.documents) != (sent.first, sent.documents):
                raise StoreError(f"{self.run.uri}: {ANOTHER_PRODUCER}")
            self._on_shard(shard, position)
            with self._changed:
                self._offered.popleft()
                self._shards.append(shard)
                self._position = position
                self._changed.notify_all()
        if self._offered:
            check_served(self.run, self.plan, progress)

    def _is_above(self) -> bool:
        self._answered = time.monotonic()
        return self._is_much or not has_room(self._held, self._limit)

    def _away(self, error: BrokerError) -> bool:
        if time.monotonic() - self._answered > BROKER_TIMEOUT:
            raise error
        return True

    def _end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._is_durable())
        self._check()
        self.plan = replace(self.plan, shards=tuple(self._shards))

    def _seal(self) -> None:
        if self._is_lost():
            self._open_again()
        self._queue.end_stream(self.plan.run_id, self._holder)
