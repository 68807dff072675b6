"""How many shards a process has, and whether it takes another: what the consumer asks before it receives a message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nermill.worker.tagging.pipeline import Pipeline

FEEDERS = 2  # shards that are read and tokenized at once
SPARE_SHARE = 0.25  # of the concurrency, kept for shards of the common queue, which are mostly of small runs
RECEIVED_SECONDS = 5.0  # a received message whose task has not begun by then is not counted any more


class Capacity:
    """The shards that a process has.

    Args:
        concurrency: The most at once.
        pipeline: Says whether the device will soon be idle.
    """

    def __init__(self, concurrency: int, pipeline: Pipeline) -> None:
        self._concurrency = concurrency
        self._pipeline = pipeline
        self._received: dict[str, float] = {}  # task id and time of shard messages whose task has not begun
        self._tagging: set[object] = set()  # one for each task of a shard that has begun
        self._feeding: set[object] = set()  # the same for shards that are being read and tokenized
        self._lock = threading.Lock()

    def received(self, task_id: str) -> None:
        """A shard's message was received; its task will begin in another thread."""
        with self._lock:
            self._received[task_id] = time.monotonic()

    @contextmanager
    def tagging(self, task_id: str) -> Iterator[Callable[[], None]]:
        """Counts a shard while its task lasts; yields what is to be called once its windows wait for the device."""
        shard = object()
        with self._lock:
            self._received.pop(task_id, None)
            self._tagging.add(shard)
            self._feeding.add(shard)

        def fed() -> None:
            with self._lock:
                self._feeding.discard(shard)

        try:
            yield fed
        finally:
            fed()
            with self._lock:
                self._tagging.discard(shard)

    def takes_common(self) -> bool:
        """Whether there is room for a shard of the common queue."""
        return self._underway() < self._concurrency

    def takes_bound(self) -> bool:
        """Whether there is room for a shard of the artifact's queue, and the device will soon be idle."""
        room = self._concurrency - int(SPARE_SHARE * self._concurrency)
        with self._lock:
            feeding = len(self._feeding) + len(self._received)
        return feeding < FEEDERS and self._underway() < room and self._pipeline.await_spare_capacity(0)

    def _underway(self) -> int:
        with self._lock:
            limit = time.monotonic() - RECEIVED_SECONDS
            self._received = {name: since for name, since in self._received.items() if since > limit}
            return len(self._received) + len(self._tagging)
