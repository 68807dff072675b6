"""What a worker process says of the shards that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from nermill.worker.contracts.document import Document
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder
from nermill.worker.contracts.plan import BY_VALUE, Options, Plan, Shard, read_plan
from nermill.worker.contracts.records import Claim, Completion
from nermill.worker.contracts.schema import part_schema
from nermill.worker.contracts.shard import encode_shard, shard_table
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.tagging.pipeline import Annotated, Stats


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


@pytest.mark.parametrize("is_compacted", [True, False])
def test_a_late_part_stays_unless_its_run_was_compacted_meanwhile(tmp_path: Path, is_compacted: bool) -> None:
    run = RunFolder(str(tmp_path))
    data, sha256 = encode_shard(shard_table([Document("0", "Ada")]))
    run.write(run.shard_file(0), data)
    shard = Shard(0, 0, 1, sha256)
    held = iter([True, False])  # its lease ends between the check and the part

    class Ledger:
        def lease(self, *_: Any) -> Claim:
            return Claim("r", run.uri, Options(), shard, "lease", 1, 0.0, fresh_until=0.0)

        def renew(self, *_: Any) -> bool:
            return next(held)

        def complete(self, *_: Any, **__: Any) -> Completion:
            return Completion(newly=True, last=False)

    def annotate(*_: Any) -> Annotated:
        planned = (replace(shard, index=7),) if is_compacted else (shard,)
        details = {"compacted": "token"} if is_compacted else {}
        Plan("r", "", {}, Options(), (), planned, details=details).write(run)
        row = {
            "doc_index": 0,
            "doc_id": "0",
            "n_chars": 3,
            "n_tokens": 1,
            "n_windows": 1,
            "status": "ok",
            "entities": [],
        }
        part = pa.Table.from_pylist([row], schema=part_schema(keep_text=False, keep_fields=False))
        return Annotated(part, {}, Stats(1, 1, 1, 0.0, 0.0, 0.0, 0.0, {}))

    pipeline = SimpleNamespace(manifest=SimpleNamespace(name="m", sha256="a" * 64), annotate=annotate)
    dispatcher = SimpleNamespace(promote=lambda _: None)
    settings = Settings(allowed_roots=str(tmp_path))
    worker = ShardWorker(pipeline, Ledger(), dispatcher, settings, Metrics())  # type: ignore[arg-type]
    told = worker.tag_shard("task", "r", run.uri, 0)["state"]
    assert (told, run.committed()) == (("lease lost", set()) if is_compacted else ("committed", {0}))


def test_a_run_by_value_stays_open_where_the_server_lost_its_memory_in_the_last_step(tmp_path: Path) -> None:
    run = RunFolder(f"{tmp_path}/run=r")
    Plan("r", "", {}, Options(), (), (), is_open=True, details={BY_VALUE: True}).write(run)

    class Ledger:
        client = SimpleNamespace(hgetall=lambda key: {})  # of the run's shards

        def key(self, *_: Any) -> str:
            return ""

        def lease(self, *_: Any) -> Claim:
            return Claim("r", run.uri, Options(), None, "lease", 1, 0.0, fresh_until=0.0)

        def renew(self, *_: Any) -> bool:
            return False

    pipeline = SimpleNamespace(manifest=SimpleNamespace(name="m", sha256="a" * 64))
    settings = Settings(allowed_roots=str(tmp_path))
    worker = ShardWorker(pipeline, Ledger(), SimpleNamespace(), settings, Metrics())  # type: ignore[arg-type]
    assert worker.finish_run("r", run.uri)["state"] == "lease lost"
    assert read_plan(run).is_open
    assert not run.exists(SUCCESS_FILE)
