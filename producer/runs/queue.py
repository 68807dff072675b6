"""The producer's side of the queue: the ledger in Redis, and Celery messages beside it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from nermill.worker.contracts.broker import celery_app, check_broker, first_version, redacted
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import BrokerError, MessageError, StoreError, UsageError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import KEY_PREFIX, QUEUE, REQUEST_PRIORITY, TAG_DOCUMENTS, queue_of
from nermill.worker.contracts.records import RunState, WorkerProcess

DEFAULT_BROKER = "redis://localhost:6379/0"
RECOVERY_SECONDS = 2.0  # between two looks at what was lost, by whomever
HOLD_SECONDS = 6.0
HIGH_WATER = 5_000_000  # documents that may be unfinished before the producer waits


class Queue:
    """A broker that answered when this was made; what goes wrong later is a BrokerError of one clear line.

    Args:
        url: Broker URL.

    Raises:
        UsageError: a URL that cannot be served, with the reason.
        BrokerError: nobody answers, or the server refuses us.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = check_broker(url)
        self._ledger = Ledger(self._client)

    @cached_property
    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(celery_app(self.url), self._ledger)

    @cached_property
    def _requests(self) -> Any:
        return celery_app(self.url, results=True)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The ledger; whatever server or network do wrong inside becomes a BrokerError."""
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            yield self._ledger
        except (RedisError, OperationalError, ConnectionError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BrokerError(f"{redacted(self.url)}: the broker does not answer any more ({reason})") from None

    def promote(self) -> None:
        """Sends the messages that are due."""
        with self.ledger() as ledger:
            self._dispatcher.promote(ledger.queues())

    def recover(self, every: float = RECOVERY_SECONDS) -> None:
        """Sends again what was lost, unless somebody looked for that in the last ``every`` seconds."""
        with self.ledger():
            self._dispatcher.recover(every)

    def request(
        self, documents: list[str | list[str]], options: dict[str, Any], *, artifact: str = "", timeout: float
    ) -> list[dict[str, Any]]:
        """Has a worker tag documents, and waits for the answer.

        Raises:
            UsageError: the worker refuses the request.
            BrokerError: no answer within ``timeout`` seconds.
        """
        from celery.exceptions import TimeoutError as CeleryTimeoutError

        with self.ledger():
            result = self._requests.send_task(
                TAG_DOCUMENTS,
                args=(documents, options),
                queue=queue_of(artifact) if artifact else QUEUE,
                priority=REQUEST_PRIORITY,
                expires=timeout,
                argsrepr=f"({len(documents)} documents)",  # texts must not show in `celery inspect` and Flower
                kwargsrepr="{}",
                retry=False,
            )
            try:
                return list(result.get(timeout))
            except CeleryTimeoutError:
                raise BrokerError(f"{redacted(self.url)}: {self._silence(timeout)}") from None
            except MessageError as error:
                raise UsageError(str(error)) from None
            except Exception as error:
                if type(error).__name__ == MessageError.__name__:
                    raise UsageError(str(error)) from None
                raise
            finally:
                result.forget()

    def _silence(self, timeout: float) -> str:
        workers = self._ledger.workers()
        if not workers:
            return f"no answer in {timeout:.0f} s, and no worker is at this broker; start nermill-worker"
        return f"no answer in {timeout:.0f} s from {len(workers)} workers; they are busy, or serve other artifacts"

    def knows(self, run_id: str) -> bool:
        """Whether the server knows a run."""
        with self.ledger() as ledger:
            return bool(ledger.uri(run_id))

    def reopen(self, run_id: str, state: RunState, on_wait: Callable[[], object] = lambda: None) -> None:
        """Lets a run take shards again; waits while a worker or producer is at its last step, and may mark it.

        Args:
            state: ``OPEN`` for a stream that goes on, else ``CLOSED``.
            on_wait: Called every 0.5 s meanwhile.
        """
        while True:
            with self.ledger() as ledger:
                if ledger.reopen(run_id, state):
                    return
            on_wait()
            time.sleep(0.5)

    def drop(self, run_id: str) -> None:
        """Makes the server forget a run."""
        with self.ledger() as ledger:
            ledger.drop(run_id)

    def hold_stream(self, run_id: str, holder: str, seconds: float = HOLD_SECONDS) -> bool:
        """Holds a run for so long, so that no other producer changes it; False where another one holds it."""
        key, milliseconds = f"{KEY_PREFIX}stream:{run_id}", int(seconds * 1000)
        with self.ledger():
            if self._client.set(key, holder, nx=True, px=milliseconds):
                return True
        return self.renew_hold(run_id, holder, seconds)

    def renew_hold(self, run_id: str, holder: str, seconds: float = HOLD_SECONDS) -> bool:
        """Holds a run for longer; False where the hold ran out, so that somebody else may have changed the run."""
        key = f"{KEY_PREFIX}stream:{run_id}"
        with self.ledger():
            return bool(self._client.get(key) == holder and self._client.pexpire(key, int(seconds * 1000)))

    @contextmanager
    def held(self, run_id: str, uri: str) -> Iterator[Callable[[], None]]:
        """Holds a run in the block, so that nobody else changes or marks it; a dead producer's hold is waited for.

        Yields:
            What renews the hold: to be called before each change, and every few seconds. It raises StoreError where
            the hold ran out, so that somebody else may have changed the run.

        Raises:
            UsageError: another producer holds the run.
        """
        holder = uuid.uuid4().hex

        def prove() -> None:
            if not self.renew_hold(run_id, holder):
                raise StoreError(f"{uri}: somebody else may have changed the run meanwhile; give the command again")

        if not self._take_hold(run_id, holder):
            raise UsageError(f"{uri}: another producer may change this run; end that one first")
        try:
            yield prove
        finally:
            self.leave_stream(run_id, holder)

    def _take_hold(self, run_id: str, holder: str) -> bool:
        """Holds a run once a dead producer's hold has run out; False where a living one holds it."""
        while not self.hold_stream(run_id, holder):
            if self.has_producer(run_id):
                return False
        return True

    def end_stream(self, run_id: str, holder: str = "") -> None:
        """Says that no more shards will be added to a stream, and that it has no producer any more.

        Args:
            holder: Its producer, where that is the caller: nothing is said where another one goes on with the stream.
        """
        if holder and not self._take_hold(run_id, holder):
            return
        self.leave_stream(run_id, holder)  # first: the last step of a run that is held is not due
        self.seal(run_id)

    def seal(self, run_id: str) -> None:
        """Says that no more shards will be added; the last step is due where all that the server knows are recorded."""
        with self.ledger() as ledger:
            is_due = ledger.seal(run_id)
        if is_due:
            self.promote()

    def leave_stream(self, run_id: str, holder: str = "") -> None:
        """Ends the hold of a run; where ``holder`` is named, only if the hold is still its own."""
        key = f"{KEY_PREFIX}stream:{run_id}"
        with self.ledger():
            if not holder or self._client.get(key) == holder:
                self._client.delete(key)

    def has_producer(self, run_id: str) -> bool:
        """Whether somebody holds a run, see ``hold_stream``: waits until the hold is renewed or runs out."""
        key = f"{KEY_PREFIX}stream:{run_id}"
        with self.ledger():
            before = int(self._client.pttl(key))
            while before > 0:
                time.sleep(0.1)
                left = int(self._client.pttl(key))
                if left > before:
                    return True
                before = left
        return False

    def setting(self, name: str) -> str | None:
        """A setting of the server; None where it does not tell (managed servers often do not)."""
        from redis.exceptions import ResponseError

        with self.ledger():
            try:
                return dict(self._client.config_get(name)).get(name)
            except ResponseError:
                return None

    def max_memory(self) -> int:
        """The server's limit of its memory in bytes; 0 where it has none or does not tell."""
        from redis.exceptions import ResponseError

        with self.ledger():
            try:
                return int(dict(self._client.info("memory")).get("maxmemory", 0))
            except ResponseError:
                return 0

    def first_version(self) -> str:
        """What the first version left at this broker; empty where there is nothing."""
        with self.ledger():
            return first_version(self._client)

    def workers(self) -> list[WorkerProcess]:
        """Worker processes that live."""
        with self.ledger() as ledger:
            return ledger.workers()

    def waiting_artifacts(self) -> set[str]:
        """The first twelve digits of each artifact whose queue has shards that no worker began."""
        with self.ledger() as ledger:
            return {queue.partition(".")[2] for queue in ledger.waiting_queues()} - {""}
