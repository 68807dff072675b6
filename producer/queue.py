"""The producer's end of the queue: the ledger in Redis, and the Celery bell beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from nermill.worker.contracts.broker import celery_app, check_broker, redacted
from nermill.worker.contracts.errors import BrokerError
from nermill.worker.contracts.ledger import Ledger, Progress, WorkerProcess
from nermill.worker.contracts.message import KEY_PREFIX, MAX_BELLS, QUEUE, TASK, bell

DEFAULT_BROKER = "redis://localhost:6379/0"
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
    def _app(self) -> Any:
        return celery_app(self.url)

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

    def ring(self, shards: int) -> None:
        """Tells workers that there is work: a bell for each shard, until MAX_BELLS lie in the queue."""
        with self.ledger(), self._app.producer_pool.acquire(block=True) as producer:
            unheard = self._client.llen(KEY_PREFIX + QUEUE)
            for _ in range(min(shards, MAX_BELLS - unheard)):
                self._app.send_task(
                    TASK, kwargs=bell(), queue=QUEUE, producer=producer, ignore_result=True, retry=False
                )

    def drop(self, run_id: str) -> None:
        """Makes the server forget a run."""
        with self.ledger() as ledger:
            ledger.drop(run_id)

    def hold_stream(self, run_id: str, seconds: float) -> None:
        """Says that the stream of an open run has a producer, for so long."""
        with self.ledger():
            self._client.set(f"{KEY_PREFIX}stream:{run_id}", 1, px=int(seconds * 1000))

    def leave_stream(self, run_id: str) -> None:
        """Says that it has none any more."""
        with self.ledger():
            self._client.delete(f"{KEY_PREFIX}stream:{run_id}")

    def has_producer(self, run_id: str) -> bool:
        """Whether somebody still sends documents to an open run: waits until the hold is renewed or runs out."""
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

    def workers(self) -> list[WorkerProcess]:
        """Worker processes that live."""
        with self.ledger() as ledger:
            return ledger.workers()

    def progress_of_runs(self) -> list[Progress]:
        """The ledger's view of each run that workers look at."""
        with self.ledger() as ledger:
            return [ledger.progress(run_id) for run_id in ledger.runs()]
