"""What streams have in common: documents come one by one, shards leave when they are full or have lingered, the end
closes the run. Where they become durable, ``stream.py`` and ``stream_by_value.py`` say."""

from __future__ import annotations

import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from nermill.producer.runs.continuation import Durable
from nermill.producer.runs.planning import model_identity, utc_now
from nermill.producer.runs.queue import HIGH_WATER, HOLD_SECONDS, Queue
from nermill.producer.runs.shards import (
    ANOTHER_PRODUCER,
    Kind,
    ShardLimits,
    differ,
    document_text,
    estimated_tokens,
    kind_of,
)
from nermill.producer.sources.live import Position
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import BrokerError, StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Input, Options, Plan, Priority, Shard

BACKLOG = 4  # shards that may wait for a slow store, and as many for a slow broker, before ``add`` waits
LOOK_SECONDS = 0.2  # between two looks at the workers while something waits for them

OnShard = Callable[[Shard, Position | None], None]


@dataclass
class Group:
    """Documents of a shard to come, and the places in the input behind each."""

    documents: list[Document] = field(default_factory=list)
    positions: list[Position | None] = field(default_factory=list)
    characters: int = 0
    tokens: int = 0
    kind: Kind = None
    since: float = 0.0


class BaseStream(ABC):
    """An open run that one producer fills; its methods may be called from several threads.

    One thread makes shards of groups of documents, another one speaks to the broker; neither holds the lock meanwhile.
    Once ``failure`` is set, ``add``, ``flush`` and ``close`` raise it; what is durable by then stays so.

    Attributes:
        run: The run's folder.
        plan: Its plan; with its shards once the stream is closed.
        failure: What ended the stream before its end.
        rejected: Documents that came without a fault and are rejects nevertheless.
        is_closed: Whether ``close`` made everything durable.

    Args:
        out: Folder or URI that holds runs.
        queue: The broker.
        model: Artifact by name or path; None leaves it to the workers.
        options: How documents are tagged.
        limits: When a shard is full.
        linger: Seconds that a document waits at most for its shard to fill.
        high_water: Unfinished documents above which ``add`` waits.
        source: What the plan calls the input.
        priority: Whose shards go first.
        on_shard: Told of each durable shard, in order; what it raises becomes ``failure``.
        run_id: Name of a new run; default: one that no other run has.
        durable: A run that goes on, as ``continuation.find_durable`` found it; then ``out``, ``model``, ``options``,
            ``source`` and ``run_id`` are those of its plan.

    Raises:
        UsageError: the output or the model is wrong, or the run has another producer.
        BrokerError: the broker does not answer.
    """

    details: ClassVar[dict[str, Any]] = {}  # of a new run's plan

    def __init__(
        self,
        out: str,
        queue: Queue,
        *,
        model: str | None = None,
        options: Options | None = None,
        limits: ShardLimits | None = None,
        linger: float = 1.0,
        high_water: int = HIGH_WATER,
        source: str = "-",
        priority: Priority = "normal",
        on_shard: OnShard = lambda *_: None,
        run_id: str = "",
        durable: Durable | None = None,
    ) -> None:
        self._queue, self._limits, self._linger, self._high_water = queue, limits or ShardLimits(), linger, high_water
        self._on_shard = on_shard
        self._changed = threading.Condition()  # of everything below; nobody reads, writes or sends while holding it
        self._group = Group()
        self._full: deque[Group] = deque()  # groups that the store has not yet
        self._taken = 0  # documents
        self._shards: list[Shard] = []
        self._untried = 0  # shards that nobody tried to send yet
        self._cuts = deque(durable.cuts if durable else ())  # places where the next shards end, whatever the limits say
        self.rejected = 0
        self.is_closed = False
        self._is_held_back = False  # whether the workers have enough
        self._is_ended = self._is_closing = self._is_written = False
        self.failure: Exception | None = None
        self._holder = uuid.uuid4().hex
        if durable is None:
            run_id = run_id or f"s{uuid.uuid4().hex[:11]}"
            self.run = RunFolder(f"{self._checked(out)}/run={run_id}")
            self.plan = Plan(
                run_id=run_id,
                created=utc_now(),
                model=model_identity(model, options or Options()),
                options=options or Options(),
                inputs=(Input(source, "jsonl", 0, "", 0),),
                shards=(),
                is_open=True,
                details=self.details,
                priority=priority,
            )
        else:
            self.run, self._shards = durable.run, list(durable.shards)
            self.plan = replace(durable.plan, shards=(), is_open=True, cancelled=False, priority=priority)
            self._taken = self._durable_documents()
        self._keep_hold()
        self._open()
        self._threads = [
            threading.Thread(target=self._guarded, args=[work], name=f"stream-{name}", daemon=True)
            for name, work in (("store", self._write_shards), ("broker", self._send_shards))
        ]
        for thread in self._threads:
            thread.start()

    def add(self, document: Document, position: Position | None = None) -> int:
        """Takes a document; it is durable once its shard left, after ``linger`` at the latest.

        Args:
            document: The document; one with an empty id is named by its index.
            position: The place in the input behind it, which becomes durable with it.

        Returns:
            The document's index in the run.

        Raises:
            StoreError: a shard could not be written.
            UsageError: the stream was closed, or the input is not the one that a stream which goes on was begun with.
        """
        text = document_text(document)
        size, cost, kind = len(text), estimated_tokens(text), kind_of(document)
        with self._changed:
            self._check()
            if self._is_closing:
                raise UsageError(f"{self.run.uri}: the stream was closed")
            group, limits = self._group, self._limits
            if not self._cuts and (
                differ(group.kind, kind)
                or group.characters + size > limits.characters
                or group.tokens + cost > limits.tokens
            ):
                self._cut()
                group = self._group
            index = self._taken
            self._taken += 1
            if not group.documents:
                group.since = time.monotonic()
                self._changed.notify_all()  # from now on it lingers
            group.documents.append(document if document.id else replace(document, id=str(index)))
            group.characters += size
            group.tokens += cost
            group.kind = group.kind or kind
            group.positions.append(position)
            if self._is_at_cut(position) if self._cuts else len(group.documents) >= limits.documents:
                self._cut()
            self._changed.wait_for(self._has_room)
            self._check()
        return index

    def flush(self) -> None:
        """Makes what was taken durable.

        Raises:
            UsageError: the input has not come to what the stream had of it, when it went on.
            Exception: ``failure``.
        """
        with self._changed:
            self._check()
            self._check_cuts()
            self._cut()
            taken = self._taken
            self._changed.wait_for(lambda: self._durable_documents() >= taken or self.failure)
            self._check()

    def end(self) -> None:
        """No more documents will come: whoever waits for workers in ``add`` goes on; ``close`` follows."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def close(self) -> Plan:
        """Ends the stream: the last shard leaves and the plan is closed.

        Raises:
            BrokerError: shards are durable but could not be sent; ``nermill resume`` sends them.
            UsageError: the input ended before what the stream had of it, when it went on.
            Exception: ``failure``; the run stays open until ``nermill resume`` closes it.
        """
        if self.is_closed:
            return self.plan
        store, broker = self._threads
        with self._changed:
            self._is_ended = self._is_closing = True
            if not self._cuts:
                self._cut()
            self._changed.notify_all()
        store.join()
        try:
            self._check()
            self._check_cuts()
            self._end()
            self.is_closed = True
        finally:
            with self._changed:
                self._is_written = True
                self._changed.notify_all()
            broker.join()
        self._check()
        try:
            self._seal()
        except BrokerError:
            told = f"all is durable, but the broker is away; later: nermill resume {self.run.uri}"
            raise BrokerError(told) from None
        return self.plan

    @property
    def documents(self) -> int:
        """How many were taken so far."""
        with self._changed:
            return self._taken

    @abstractmethod
    def send_again(self) -> None:
        """Sends what has no part, after ``close``.

        Raises:
            BrokerError: the broker does not answer.
        """

    # What depends on where documents become durable; while the broker is away, those that speak to it raise BrokerError

    @abstractmethod
    def _checked(self, out: str) -> str:
        """The output as producer and workers both understand it."""

    @abstractmethod
    def _open(self) -> None:
        """Makes the run known, before the threads begin."""

    @abstractmethod
    def _open_again(self) -> None:
        """Makes a broker that lost its memory know the run, and what of it has no part."""

    @abstractmethod
    def _is_lost(self) -> bool:
        """Whether the broker has lost the run, or a part of it."""

    @abstractmethod
    def _store(self, group: Group) -> None:
        """Makes a shard, or several, of the oldest group of ``_full``, and takes that away."""

    @abstractmethod
    def _is_waiting(self) -> bool:
        """Whether the workers are looked at often."""

    @abstractmethod
    def _send(self) -> None:
        """Sends what is not sent."""

    @abstractmethod
    def _is_above(self) -> bool:
        """Whether the workers have enough, so that ``add`` waits."""

    @abstractmethod
    def _away(self, error: BrokerError) -> bool:
        """Whether ``add`` waits while the broker is away; raises the error where it is away for too long."""

    @abstractmethod
    def _end(self) -> None:
        """Makes all durable, and completes ``plan``."""

    @abstractmethod
    def _seal(self) -> None:
        """Sends what is not sent, and says that the stream ended."""

    def _hold(self) -> bool:
        return self._queue.hold_stream(self.plan.run_id, self._holder, HOLD_SECONDS)

    def _keep_hold(self) -> None:
        if not self._hold():
            raise UsageError(f"{self.run.uri}: another producer fills this stream; end that one first")

    def _durable_documents(self) -> int:
        return self._shards[-1].first + self._shards[-1].documents if self._shards else 0

    def _has_room(self) -> bool:
        """Whether ``add`` need not wait: for the store, or for the workers."""
        if self._is_ended or self.failure:
            return True
        return not self._is_held_back and max(len(self._full), self._untried) <= BACKLOG

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _is_at_cut(self, position: Position | None) -> bool:
        """Whether a shard ended here before, of a stream that goes on.

        Raises:
            UsageError: the input is another one.
        """
        if position is None or position.byte < self._cuts[0].byte:
            return False
        if position != self._cuts[0]:
            raise self._differs(f"its first {self._cuts[0].byte:,} bytes are not those that were sent before")
        self._cuts.popleft()
        return True

    def _check_cuts(self) -> None:
        """Looks whether all of the input was read again that a stream which goes on had sent.

        Raises:
            UsageError: it was not.
        """
        if self._cuts:
            raise self._differs(f"ends before byte {self._cuts[-1].byte:,}, up to which its documents were sent")

    def _differs(self, how: str) -> UsageError:
        return UsageError(f"{self.run.uri}: the input {how}; give the same one, or name another --out")

    def _cut(self) -> None:
        if self._group.documents:
            self._full.append(self._group)
            self._group = Group()
            self._changed.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, senders must hear of it
            with self._changed:
                self.failure = self.failure or error
                self._changed.notify_all()

    # What the thread of the store does

    def _write_shards(self) -> None:
        while (group := self._next_group()) is not None:
            self._store(group)

    def _next_group(self) -> Group | None:
        """The oldest group that is full or has lingered, once there is one; None at the end or after a failure."""
        with self._changed:
            while not self._full:
                if self._is_closing or self.failure:
                    return None
                lingers = self._group.documents and not self._cuts
                due = self._group.since + self._linger if lingers else None
                if due is not None and due <= time.monotonic():
                    self._cut()
                else:
                    self._changed.wait(None if due is None else due - time.monotonic())
            return None if self.failure else self._full[0]

    # What the thread of the broker does

    def _send_shards(self) -> None:
        held = time.monotonic()
        while True:
            due = held + HOLD_SECONDS / 3
            with self._changed:
                until = min(due, time.monotonic() + LOOK_SECONDS) if self._is_waiting() else due
                self._changed.wait_for(self._has_to_send, max(0.0, until - time.monotonic()))
                if self._is_written or self.failure:
                    return
                untried = self._untried
            is_hold_due = time.monotonic() >= due
            if is_hold_due:
                held = time.monotonic()
            try:
                if is_hold_due:
                    self._renew()
                self._send()
                is_held_back = self._is_above()
            except BrokerError as error:
                is_held_back = self._away(error)
            with self._changed:
                self._untried -= untried
                self._is_held_back = is_held_back
                self._changed.notify_all()

    def _has_to_send(self) -> bool:
        return self._untried > 0 or self._is_written or self.failure is not None

    def _renew(self) -> None:
        """Says that the stream has a producer; makes a broker that lost its memory know the run again."""
        if not self._hold():
            raise StoreError(f"{self.run.uri}: {ANOTHER_PRODUCER}")
        if self._is_lost():
            self._open_again()
