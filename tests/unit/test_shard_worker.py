"""What a worker process says of the shards that it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings
from nermill.worker.queue.shards import ShardWorker


def test_a_shard_counts_while_its_lease_is_asked_for() -> None:
    room: list[bool] = []

    class Ledger:
        def lease(self, *_: Any) -> str:
            room.append(worker.capacity.takes_common())
            return "done"

    pipeline = SimpleNamespace(manifest=SimpleNamespace(name="m", sha256="a" * 64))
    worker = ShardWorker(pipeline, Ledger(), SimpleNamespace(), Settings(concurrency=1), Metrics())  # type: ignore[arg-type]
    assert worker.capacity.takes_common()
    worker.capacity.received("task")
    assert not worker.capacity.takes_common()
    assert worker.tag_shard("task", "r", "/out", 0)["state"] == "done"
    assert room == [False]
    assert worker.capacity.takes_common()
