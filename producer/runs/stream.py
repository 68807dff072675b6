"""An open run: documents come one by one, shards leave when they are full or have lingered, the end closes it."""

from __future__ import annotations

import os
import select
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nermill.producer.runs.planning import check_writable, model_identity, normalised, utc_now
from nermill.producer.runs.queue import HIGH_WATER, Queue
from nermill.producer.runs.recovery import closed
from nermill.producer.runs.run import is_above, open_ledger, send_shards
from nermill.producer.runs.shards import (
    Kind,
    ShardLimits,
    differ,
    document_text,
    estimated_tokens,
    kind_of,
    write_shard,
)
from nermill.producer.sources.files import is_remote
from nermill.worker.contracts.content import BLOCK, MAX_LINE_BYTES
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import BrokerError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Input, Options, Plan, Priority, Shard

HOLD_SECONDS = 6.0
_TICK_SECONDS = 0.01
_FOLLOW_SECONDS = 0.05
_STOP_SECONDS = 0.1
_WAIT_SECONDS = 0.2


@dataclass
class _Waiting:
    """Documents of the shard to come."""

    documents: list[Document] = field(default_factory=list)
    characters: int = 0
    tokens: int = 0
    kind: Kind = None
    since: float = 0.0


class Stream:
    """An open run that one producer fills; its methods may be called from several threads.

    What a shard holds is durable when ``on_shard`` hears of it. When the broker is away, shards are kept in the
    run's folder and sent as soon as it is back. Whoever holds ``lock`` is the only one that adds. Once ``failure``
    is set, ``add``, ``flush`` and ``close`` raise it; what is durable by then stays so.

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
        on_shard: Told of each durable shard; what it raises reaches whoever adds or closes.

    Raises:
        UsageError: the output or the model is wrong.
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
        on_shard: Callable[[Shard], None] = lambda _: None,
    ) -> None:
        root = normalised(out)
        if not is_remote(root):
            check_writable(root)
        run_id = f"s{uuid.uuid4().hex[:11]}"
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
        self._queue, self._limits, self._linger, self._high_water = queue, limits or ShardLimits(), linger, high_water
        self._on_shard = on_shard
        self._waiting = _Waiting()
        self._shards: list[Shard] = []
        self._unsent: list[Shard] = []
        self._seen_shards = 0
        self.lock = threading.RLock()  # for senders; whoever waits for workers may hold it
        self._state = threading.RLock()  # for what waits and what was sent; nobody waits with it
        self._ended = threading.Event()
        self.failure: Exception | None = None
        self.plan.write(self.run)
        with queue.ledger() as ledger:
            open_ledger(ledger, self.run, self.plan)
        queue.hold_stream(run_id, HOLD_SECONDS)
        self._keeper = threading.Thread(target=self._keep, name="stream", daemon=True)
        self._keeper.start()

    def add(self, document: Document) -> int:
        """Takes a document; it is durable once its shard left, after ``linger`` at the latest.

        Returns:
            The document's index in the run.

        Raises:
            StoreError: a shard could not be written.
        """
        with self.lock:
            index = self._take(document)
            if len(self._shards) > self._seen_shards:  # whoever cut them: a limit, or the linger
                self._seen_shards = len(self._shards)
                self._wait_for_workers()
        return index

    def flush(self) -> None:
        """Makes what waits a durable shard and sends it."""
        with self._state:
            self._check()
            if not self._waiting.documents:
                return
            shard = write_shard(self.run, len(self._shards), self._sent_documents, self._waiting.documents)
            self._waiting = _Waiting()
            self._shards.append(shard)
            self._unsent.append(shard)
            self._on_shard(shard)
            self._send()

    def end(self) -> None:
        """No more documents will come: whoever waits for workers in ``add`` goes on; ``close`` follows."""
        self._ended.set()

    def close(self) -> Plan:
        """Ends the stream: the last shard leaves and the plan is closed.

        Raises:
            BrokerError: shards are durable but could not be sent; ``nermill resume`` sends them.
            Exception: ``failure``; the run stays open until ``nermill resume`` closes it.
        """
        self.end()
        self._keeper.join()
        with self._state:
            self.flush()
            self.plan = closed(self.plan, self._shards)
            self.plan.write(self.run)
            if not self._send():
                raise BrokerError(f"all is durable, but the broker is away; later: nermill resume {self.run.uri}")
            seal(self.plan, self._queue)
        return self.plan

    @property
    def documents(self) -> int:
        """How many were taken so far."""
        with self._state:
            return self._sent_documents + len(self._waiting.documents)

    @property
    def _sent_documents(self) -> int:
        return self._shards[-1].first + self._shards[-1].documents if self._shards else 0

    def _take(self, document: Document) -> int:
        text = document_text(document)
        size, cost = len(text), estimated_tokens(text)
        with self._state:
            self._check()
            waiting, limits, kind = self._waiting, self._limits, kind_of(document)
            if (
                differ(waiting.kind, kind)
                or waiting.characters + size > limits.characters
                or waiting.tokens + cost > limits.tokens
            ):
                self.flush()
                waiting = self._waiting
            waiting.since = waiting.since or time.monotonic()
            index = self.documents
            waiting.documents.append(document)
            waiting.characters += size
            waiting.tokens += cost
            waiting.kind = waiting.kind or kind
            if len(waiting.documents) >= limits.documents:
                self.flush()
        return index

    def _send(self) -> bool:
        try:
            send_shards(self._queue, self.plan, self._unsent)
        except BrokerError:
            return False
        self._unsent = []
        return True

    def _keep(self) -> None:
        held = time.monotonic()
        while not self._ended.wait(min(_TICK_SECONDS, self._linger)):
            with self._state:
                now = time.monotonic()
                try:
                    if self._waiting.documents and now - self._waiting.since >= self._linger:
                        self.flush()
                    if now - held > HOLD_SECONDS / 3:
                        held = now
                        self._hold()
                except Exception as error:  # whatever it is, senders must hear of it
                    self.failure = error
                    return

    def _hold(self) -> None:
        try:
            with self._queue.ledger() as ledger:
                if ledger.progress(self.plan.run_id).state == "unknown":  # the server lost its memory
                    open_ledger(ledger, self.run, self.plan)
                    self._unsent = list(self._shards)
            self._queue.hold_stream(self.plan.run_id, HOLD_SECONDS)
            self._send()
        except BrokerError:
            return  # shards are durable; the next look tries again

    def _wait_for_workers(self) -> None:
        try:
            while not self.failure and is_above(self._queue, self.plan, self._high_water):
                if self._ended.wait(_WAIT_SECONDS):
                    return
        except BrokerError:
            return

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure


def seal(plan: Plan, queue: Queue) -> None:
    """Tells the ledger that a stream ended."""
    with queue.ledger() as ledger:
        is_due = ledger.seal(plan.run_id)
    queue.leave_stream(plan.run_id)
    if is_due:
        queue.promote()


def live_lines(descriptor: int, stop: threading.Event, *, follow: bool) -> Iterator[tuple[int, bytes | None]]:
    """Lines as they come, numbered from 1 on; None for a line above MAX_LINE_BYTES.

    Args:
        descriptor: Where to read.
        stop: Ends the reading; what has no line end yet is left.
        follow: Whether the end of a file is only its end so far.
    """
    number, rest, too_long = 0, b"", False
    while not stop.is_set():
        if not select.select([descriptor], [], [], _STOP_SECONDS)[0]:
            continue
        block = os.read(descriptor, BLOCK)
        if not block and follow:
            stop.wait(_FOLLOW_SECONDS)
            continue
        *lines, rest = (rest + block).split(b"\n") if block else ([rest] if rest else []) + [b""]
        for line in lines:
            number += 1
            yield number, None if too_long else line.removesuffix(b"\r")
            too_long = False
        if not block:
            return
        if len(rest) > MAX_LINE_BYTES:
            rest, too_long = b"", True
