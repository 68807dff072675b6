"""Large parts hold what the small ones held, and the run stays a run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from producer import compact as compacting
from producer import run as runs
from producer.compact import compact
from producer.planning import Request, make_plan
from producer.queue import Queue
from producer.rejects import read_rejects, retry
from producer.shards import ShardLimits
from producer.status import look
from worker.contracts.errors import UsageError
from worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from worker.contracts.plan import Plan, read_plan
from worker.contracts.schema import metadata_of

from .conftest import POISON


@pytest.fixture(params=["disk", "store"])
def complete(request, broker, serving, tmp_path):
    path = tmp_path / "in.jsonl"
    texts = [f"Ada {n}" for n in range(20)] + [POISON]
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    out = str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}"
    run, plan = make_plan(Request((str(path),), out, limits=ShardLimits(documents=3)))
    queue = Queue(broker)
    runs.send(run, plan, queue)
    with serving():
        runs.wait(run, plan, queue)
    return run, plan


def table_of(run: RunFolder, plan: Plan) -> pa.Table:
    tables = [pq.read_table(pa.BufferReader(run.read(part_name(shard.index)))) for shard in plan.shards]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def test_nothing_but_the_files_changes(complete):
    run, plan = complete
    before, status, rejects = table_of(run, plan), look(run, plan), list(read_rejects(run, plan))
    compacted = compact(run, plan)
    assert (len(plan.shards), len(compacted.shards), run.committed(), run.shards()) == (7, 1, {0}, {0})
    assert read_plan(run) == compacted
    assert table_of(run, compacted) == before
    assert list(read_rejects(run, compacted)) == rejects
    after = look(run, compacted)
    assert (after.ok, after.rejected, after.tokens, after.workers) == (
        status.ok, status.rejected, status.tokens, status.workers,
    )  # fmt: skip
    assert after.seconds == pytest.approx(status.seconds)
    assert run.exists(SUCCESS_FILE)
    metadata = metadata_of(pq.read_schema(pa.BufferReader(run.read(part_name(0)))))
    assert (metadata["run_id"], metadata["shard"], len(json.loads(metadata["stats"]))) == (plan.run_id, "0", 7)
    assert compact(run, compacted) == compacted


def test_target_size_cuts_in_order(complete):
    run, plan = complete
    size = len(run.read(part_name(0)))
    compacted = compact(run, plan, 3 * size)
    assert [s.first for s in compacted.shards] == [0, 9, 18] or len(compacted.shards) in (3, 4)
    assert table_of(run, compacted)["doc_index"].to_pylist() == list(range(21))


def test_rejects_can_be_tried_again_afterwards(complete, broker, serving):
    run, plan = complete
    compacted = compact(run, plan)
    queue = Queue(broker)
    assert retry(run, compacted, queue) == (1, 0)
    with serving():
        assert runs.wait(run, compacted, queue).ok == 20


def test_an_unfinished_run_is_left_alone(complete):
    run, plan = complete
    run.remove(part_name(2))
    with pytest.raises(UsageError, match="not complete"):
        compact(run, plan)


@pytest.mark.parametrize("complete", ["disk"], indirect=True)
def test_a_reader_sees_all_or_an_error(complete):
    run, plan = complete
    expected, wrong, stop = set(range(21)), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                names = sorted(Path(run.uri).glob("part-*.parquet"))
                found = [i for name in names for i in pq.read_table(name)["doc_index"].to_pylist()]
            except FileNotFoundError:
                continue
            if names and sorted(found) != sorted(expected):
                wrong.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for target in (400, 3 * len(run.read(part_name(0))), compacting.TARGET_BYTES):
        plan = compact(run, plan, target)
    stop.set()
    reader.join()
    assert wrong == []


@pytest.mark.parametrize("complete", ["store"], indirect=True)
def test_an_interrupted_swap_is_taken_up(complete, monkeypatch):
    run, plan = complete
    before = table_of(run, plan)
    original = RunFolder.remove

    def fail_once(self: RunFolder, name: str) -> None:
        if name == part_name(3):
            monkeypatch.setattr(RunFolder, "remove", original)
            raise KeyboardInterrupt
        original(self, name)

    monkeypatch.setattr(RunFolder, "remove", fail_once)
    with pytest.raises(KeyboardInterrupt):
        compact(run, plan)
    assert not run.exists(SUCCESS_FILE)
    compacted = compact(run, read_plan(run))
    assert table_of(run, compacted) == before
    assert run.exists(SUCCESS_FILE)
    assert run.committed() == {0}
