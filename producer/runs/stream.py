"""An open run: documents come one by one, shards leave when they are full or have lingered, the end closes it."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nermill.producer.runs.continuation import Durable
from nermill.producer.runs.planning import check_writable, model_identity, normalised, utc_now
from nermill.producer.runs.queue import HIGH_WATER, Queue
from nermill.producer.runs.recovery import closed
from nermill.producer.runs.run import is_above, open_ledger, send_shards
from nermill.producer.runs.shards import (
    ANOTHER_PRODUCER,
    Kind,
    ShardLimits,
    differ,
    document_text,
    estimated_tokens,
    kind_of,
    write_shard,
)
from nermill.producer.sources.files import is_remote
from nermill.producer.sources.live import Position
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import BrokerError, StoreError, UsageError
from nermill.worker.contracts.layout import REJECT_FILE, REPORT_HTML, REPORT_JSON, SUCCESS_FILE, RunFolder
from nermill.worker.contracts.plan import Input, Options, Plan, Priority, Shard

HOLD_SECONDS = 6.0
BACKLOG = 4  # shards that may wait for a slow store, and as many for a slow broker, before ``add`` waits
_WAIT_SECONDS = 0.2  # between two looks at the workers while ``add`` waits for them

OnShard = Callable[[Shard, Position | None], None]


@dataclass
class _Group:
    """Documents of a shard to come; ``position`` is the place in the input behind the last one."""

    documents: list[Document] = field(default_factory=list)
    characters: int = 0
    tokens: int = 0
    kind: Kind = None
    since: float = 0.0
    position: Position | None = None


class Stream:
    """An open run that one producer fills; its methods may be called from several threads.

    One thread writes shards, another one speaks to the broker; neither holds the lock meanwhile. When the broker is
    away, shards are kept in the run's folder and sent as soon as it is back. Once ``failure`` is set, ``add``,
    ``flush`` and ``close`` raise it; what is durable by then stays so.

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
        self._group = _Group()
        self._full: deque[_Group] = deque()  # groups that the store has not yet
        self._taken = 0  # documents
        self._shards: list[Shard] = []
        self._unsent: list[Shard] = []
        self._untried = 0  # shards that nobody tried to send yet
        self._is_held_back = False  # whether the workers have enough
        self._is_ended = self._is_closing = self._is_written = False
        self.failure: Exception | None = None
        self._holder = uuid.uuid4().hex
        if durable is None:
            root = normalised(out)
            if not is_remote(root):
                check_writable(root)
            run_id = run_id or f"s{uuid.uuid4().hex[:11]}"
            self.run = RunFolder(f"{root}/run={run_id}")
            self.plan = Plan(
                run_id=run_id,
                created=utc_now(),
                model=model_identity(model, options or Options()),
                options=options or Options(),
                inputs=(Input(source, "jsonl", 0, "", 0),),
                shards=(),
                is_open=True,
                priority=priority,
            )
        else:
            self.run, self._shards = durable.run, list(durable.shards)
            self.plan = replace(durable.plan, shards=(), is_open=True, cancelled=False, priority=priority)
            self._taken = self._durable_documents()
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
            UsageError: the stream was closed.
        """
        text = document_text(document)
        size, cost, kind = len(text), estimated_tokens(text), kind_of(document)
        with self._changed:
            self._check()
            if self._is_closing:
                raise UsageError(f"{self.run.uri}: the stream was closed")
            group, limits = self._group, self._limits
            if (
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
            group.position = position
            if len(group.documents) >= limits.documents:
                self._cut()
            self._changed.wait_for(self._has_room)
            self._check()
        return index

    def flush(self) -> None:
        """Makes what was taken durable."""
        with self._changed:
            self._check()
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
            Exception: ``failure``; the run stays open until ``nermill resume`` closes it.
        """
        if not self.plan.is_open:
            return self.plan
        store, broker = self._threads
        with self._changed:
            self._is_ended = self._is_closing = True
            self._cut()
            self._changed.notify_all()
        store.join()
        try:
            self._check()
            self.plan = closed(self.plan, self._shards)
            self.plan.write(self.run)
        finally:
            with self._changed:
                self._is_written = True
                self._changed.notify_all()
            broker.join()
        self._check()
        if not self._send():
            raise BrokerError(f"all is durable, but the broker is away; later: nermill resume {self.run.uri}")
        seal(self.plan, self._queue)
        return self.plan

    @property
    def documents(self) -> int:
        """How many were taken so far."""
        with self._changed:
            return self._taken

    def _open(self) -> None:
        """Makes the run known, to whoever looks at its folder and to the broker."""
        if not self._hold():
            raise UsageError(f"{self.run.uri}: another producer fills this stream; end that one first")
        for name in (SUCCESS_FILE, REPORT_JSON, REPORT_HTML, REJECT_FILE):
            self.run.remove(name)  # of a run that goes on
        self.plan.write(self.run)
        with self._queue.ledger() as ledger:
            open_ledger(ledger, self.run, self.plan)
        if self._shards:
            self._queue_again()

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

    def _cut(self) -> None:
        if self._group.documents:
            self._full.append(self._group)
            self._group = _Group()
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
            last = self._shards[-1] if self._shards else None
            shard = write_shard(
                self.run,
                last.index + 1 if last else 0,
                self._durable_documents(),
                group.documents,
                position=group.position,
                exclusive=True,
            )
            self._on_shard(shard, group.position)
            with self._changed:
                self._full.popleft()
                self._shards.append(shard)
                self._unsent.append(shard)
                self._untried += 1
                self._changed.notify_all()

    def _next_group(self) -> _Group | None:
        """The oldest group that is full or has lingered, once there is one; None at the end or after a failure."""
        with self._changed:
            while not self._full:
                if self._is_closing or self.failure:
                    return None
                due = self._group.since + self._linger if self._group.documents else None
                if due is not None and due <= time.monotonic():
                    self._cut()
                else:
                    self._changed.wait(None if due is None else due - time.monotonic())
            return None if self.failure else self._full[0]

    # What the thread of the broker does

    def _send_shards(self) -> None:
        held = time.monotonic()
        while True:
            until = held + HOLD_SECONDS / 3
            with self._changed:
                if self._is_held_back:
                    until = min(until, time.monotonic() + _WAIT_SECONDS)
                self._changed.wait_for(self._has_to_send, max(0.0, until - time.monotonic()))
                if self._is_written or self.failure:
                    return
                untried = self._untried
            if is_hold_due := time.monotonic() - held > HOLD_SECONDS / 3:
                held = time.monotonic()
                self._renew()
            if untried or is_hold_due:
                self._send()
            is_held_back = self._is_above()
            with self._changed:
                self._untried -= untried
                self._is_held_back = is_held_back
                self._changed.notify_all()

    def _has_to_send(self) -> bool:
        return self._untried > 0 or self._is_written or self.failure is not None

    def _renew(self) -> None:
        """Says that the stream has a producer; makes a broker that lost its memory know the run again."""
        try:
            if not self._hold():
                raise StoreError(f"{self.run.uri}: {ANOTHER_PRODUCER}")
            with self._queue.ledger() as ledger:
                if ledger.progress(self.plan.run_id).state != "unknown":
                    return
                open_ledger(ledger, self.run, self.plan)
            self._queue_again()
        except BrokerError:
            return  # shards are durable; the next look tries again

    def _hold(self) -> bool:
        return self._queue.hold_stream(self.plan.run_id, self._holder, HOLD_SECONDS)

    def _queue_again(self) -> None:
        committed = self.run.committed()
        with self._changed:
            self._unsent = [shard for shard in self._shards if shard.index not in committed]
            self._untried += 1

    def _send(self) -> bool:
        with self._changed:
            shards = list(self._unsent)
        try:
            send_shards(self._queue, self.plan, shards)
        except BrokerError:
            return False
        with self._changed:
            self._unsent = self._unsent[len(shards) :]
        return True

    def _is_above(self) -> bool:
        try:
            return is_above(self._queue, self.plan, self._high_water)
        except BrokerError:
            return False


def seal(plan: Plan, queue: Queue) -> None:
    """Tells the ledger that a stream ended."""
    with queue.ledger() as ledger:
        is_due = ledger.seal(plan.run_id)
    queue.leave_stream(plan.run_id)
    if is_due:
        queue.promote()
