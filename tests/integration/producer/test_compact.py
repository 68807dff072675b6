"""Large parts hold what the small ones held, and the run stays a run."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet as pq

from producer import compact as compacting
from producer import run as runs
from producer.compact import compact
from producer.planning import Request, make_plan
from producer.queue import Queue
from producer.rejects import read_rejects, retry
from producer.shards import ShardLimits
from producer.status import look
from worker.contracts.errors import StoreError, UsageError
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
    (joined,) = compacted.shards
    assert joined.index == (0 if run.is_local else 7)  # on a store no name is used for other documents
    assert (len(plan.shards), run.committed(), run.shards()) == (7, {joined.index}, {joined.index})
    assert read_plan(run) == compacted
    assert table_of(run, compacted) == before
    assert list(read_rejects(run, compacted)) == rejects
    after = look(run, compacted)
    assert (after.ok, after.rejected, after.tokens, after.workers) == (
        status.ok, status.rejected, status.tokens, status.workers,
    )  # fmt: skip
    assert after.seconds == pytest.approx(status.seconds)
    assert run.exists(SUCCESS_FILE)
    metadata = metadata_of(pq.read_schema(pa.BufferReader(run.read(part_name(joined.index)))))
    assert (metadata["run_id"], len(json.loads(metadata["stats"]))) == (plan.run_id, 7)
    assert metadata["shard"] == str(joined.index)
    assert compact(run, compacted) == compacted


def test_target_size_cuts_in_order(complete):
    run, plan = complete
    size = len(run.read(part_name(0)))
    compacted = compact(run, plan, 3 * size)
    assert [s.first for s in compacted.shards] == [0, 9, 18] or len(compacted.shards) in (3, 4)
    assert table_of(run, compacted)["doc_index"].to_pylist() == list(range(21))


def test_texts_and_words_stay_apart(broker, serving, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Ada"}\n{"text": "Bob"}\n{"text": "Carol"}\n')
    (tmp_path / "b.conll").write_text("Ada B-PER\n\nBob B-PER\n\nCarol B-PER\n")
    inputs = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.conll", "a.jsonl"))
    run, plan = make_plan(Request(inputs, str(tmp_path / "out"), limits=ShardLimits(documents=2)))
    with serving():
        runs.send(run, plan, Queue(broker))
        runs.wait(run, plan, Queue(broker))
    compacted = compact(run, plan)
    assert ([s.documents for s in plan.shards], [s.documents for s in compacted.shards]) == ([2, 1, 2, 1], [3, 3])


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


def listed(run: RunFolder) -> list[int] | None:
    """What a careful reader sees: lists, looks for _SUCCESS, reads; None where it has to look again."""
    names = [name for name in run.list() if name.startswith("part-")]
    if not run.exists(SUCCESS_FILE):
        return None
    try:
        tables = [pq.read_table(pa.BufferReader(run.read(name)), columns=["doc_index"]) for name in names]
    except StoreError:  # gone since it was listed
        return None
    return pa.concat_tables(tables)["doc_index"].to_pylist() if tables else []


def planned(run: RunFolder) -> list[int] | None:
    """What a reader sees that goes by the plan."""
    try:
        plan = read_plan(run)
        return table_of(run, plan)["doc_index"].to_pylist()
    except (UsageError, StoreError):
        return None


@pytest.mark.parametrize("reader", [listed, planned])
def test_readers_see_every_document_once(complete, reader):
    run, plan = complete
    wrong, looks, stop = [], 0, threading.Event()

    def read() -> None:
        nonlocal looks
        while not stop.is_set():
            if (found := reader(run)) is not None:
                looks += 1
                if found != list(range(21)):
                    wrong.append(found)

    thread = threading.Thread(target=read)
    thread.start()
    for target in (400, 3 * len(run.read(part_name(0))), compacting.TARGET_BYTES):
        plan = compact(run, plan, target)
    stop.set()
    thread.join()
    assert reader(run) == list(range(21))
    assert (wrong, looks > 0) == ([], True)


@pytest.mark.parametrize("complete", ["store"], indirect=True)
@pytest.mark.parametrize("mend", ["compact", "resume"])
def test_a_swap_that_is_interrupted_anywhere_is_taken_up(complete, broker, monkeypatch, mend):
    run, plan = complete
    before, files, target = table_of(run, plan), dict(MemoryFileSystem.store), 3 * len(run.read(part_name(0)))
    for step in itertools.count(1, 2):
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(files)
        with monkeypatch.context() as patch:
            calls = itertools.count(1)
            for name in ("pipe_file", "copy", "rm_file"):
                patch.setattr(MemoryFileSystem, name, dying(getattr(MemoryFileSystem, name), calls, step))
            try:
                compact(run, plan, target)
                break
            except KeyboardInterrupt:
                pass
        assert planned(run) == list(range(21))
        assert listed(run) in (None, list(range(21)))
        if mend == "compact":
            assert len(compact(run, read_plan(run), target).shards) < len(plan.shards)
        else:
            runs.resume(run, read_plan(run), Queue(broker))
        after = read_plan(run)
        assert table_of(run, after) == before
        assert listed(run) == planned(run) == list(range(21))
        assert run.committed() == run.shards() == {shard.index for shard in after.shards}
    assert step > 30


def dying(method: Callable[..., object], calls: Iterator[int], step: int) -> Callable[..., object]:
    """The method, but the call of that number is never made."""

    def call(*arguments: object, **keywords: object) -> object:
        if next(calls) == step:
            raise KeyboardInterrupt
        return method(*arguments, **keywords)

    return call
