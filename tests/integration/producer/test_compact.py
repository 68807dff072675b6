"""Large parts hold what the small ones held, and the run stays a run."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet as pq

from nermill.producer.runs import compact as compacting
from nermill.producer.runs import run as runs
from nermill.producer.runs.compact import compact, finish_interrupted_swap
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.rejects import read_rejects, retry
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import look
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.plan import read_plan
from nermill.worker.contracts.records import Claim
from nermill.worker.contracts.schema import metadata_of
from tests.harness import table_of
from tests.stand_in import next_claim

from .conftest import ARTIFACT, POISON, tag


@pytest.fixture(params=["disk", "store"])
def planned_run(request, tmp_path):
    path = tmp_path / "in.jsonl"
    texts = [f"Ada {n}" for n in range(20)] + [POISON]
    path.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    out = str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}"
    return make_plan(Request((str(path),), out, limits=ShardLimits(documents=3)))


@pytest.fixture
def complete(planned_run, broker, serving):
    run, plan = planned_run
    queue = Queue(broker)
    runs.send(run, plan, queue)
    with serving():
        runs.wait(run, plan, queue)
    return run, plan


def test_nothing_but_the_files_changes(complete):
    run, plan = complete
    before, status, rejects = table_of(run, plan), look(run, plan), list(read_rejects(run, plan))
    compacted = compact(run, plan)
    (joined,) = compacted.shards
    assert joined.index == 7  # no name is used for other documents
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
    assert retry(run, compacted, queue) == (1, 0, 0)
    with serving():
        assert runs.wait(run, compacted, queue).ok == 20


@pytest.mark.slow
def test_a_run_is_compacted_and_read_twenty_times_by_commands(broker, tmp_path):
    """pyarrow ended such a process about every second time, where a thread of its own let go of a Python object."""
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(f'{{"text": "Ada met Bob {n}"}}\n' for n in range(199)) + '{"text": ""}\n')
    run, plan = make_plan(Request((str(corpus),), str(tmp_path / "out"), limits=ShardLimits(documents=1)))
    assert len(plan.shards) == 200
    runs.send(run, plan, Queue(broker))
    ledger = Ledger(redis_client(broker))
    while claim := next_claim(ledger, ARTIFACT):
        tag(claim, ledger)
    said = set()
    for _ in range(20):
        for command in ("compact", "rejects"):
            arguments = [sys.executable, "-m", "nermill.producer.cli", command, run.uri, "--json"]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            said.add(done.stdout)
    assert [json.loads(line)["parts"] for line in sorted(said) if "parts" in line] == [
        {"before": 1, "after": 1}, {"before": 200, "after": 1},
    ]  # fmt: skip
    assert [json.loads(line)["reason"] for line in said if "reason" in line] == ["empty"]


def test_a_part_never_holds_more_characters_than_a_worker_should(complete, monkeypatch):
    run, plan = complete
    monkeypatch.setattr(compacting, "MAX_CHARACTERS", 40)
    compacted = compact(run, plan)
    characters = [sum(column(run, part_name(shard.index), "n_chars")) for shard in compacted.shards]
    assert (max(characters) <= 40, len(compacted.shards)) == (True, 4)


class Dying(Ledger):
    """That of a worker which dies once its part is there."""

    def complete(self, claim: Claim, *_: object, **__: object) -> None:  # type: ignore[override]
        """Never told."""


def test_a_lease_that_is_left_over_does_not_come_back(planned_run, broker, serving):
    run, plan = planned_run
    queue = Queue(broker)
    runs.send(run, plan, queue)
    ledger = Dying(redis_client(broker))
    left_over = next_claim(ledger, ARTIFACT)
    assert left_over is not None
    tag(left_over, ledger)
    with serving() as server:
        while len(server.done(plan.run_id)) < len(plan.shards) - 1:
            pass
    compacted = compact(run, plan)
    assert ledger.progress(plan.run_id).leased == 1
    assert retry(run, compacted, queue) == (1, 0, 0)
    after = ledger.progress(plan.run_id)
    assert (after.waiting, after.leased, after.done) == (1, 0, 0)
    claim = next_claim(ledger, ARTIFACT)
    assert claim is not None
    assert runs.send(run, compacted, queue) == 0  # what is at work now is left alone
    assert ledger.release(claim)
    with serving():
        assert runs.wait(run, compacted, queue).ok == 20


def test_an_unfinished_run_is_left_alone(complete):
    run, plan = complete
    run.remove(part_name(2))
    with pytest.raises(UsageError, match="not complete"):
        compact(run, plan)


def column(run: RunFolder, name: str, wanted: str) -> list[Any]:
    with pq.ParquetFile(pa.BufferReader(run.read(name))) as part:
        return part.read([wanted], use_threads=False)[wanted].to_pylist()


def listed(run: RunFolder) -> list[int] | None:
    """What a careful reader sees: lists, looks for _SUCCESS, reads; None where it has to look again."""
    names = [name for name in run.list() if name.startswith("part-")]
    if not run.exists(SUCCESS_FILE):
        return None
    try:
        return [index for name in names for index in column(run, name, "doc_index")]
    except StoreError:  # gone since it was listed
        return None


def planned(run: RunFolder) -> list[Any] | None:
    """What a reader sees that goes by the plan."""
    try:
        plan = read_plan(run)
        return table_of(run, plan)["doc_index"].to_pylist()
    except (UsageError, StoreError, FileNotFoundError):  # the part is gone since the plan was read
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


@pytest.mark.parametrize("planned_run", ["store"], indirect=True)
@pytest.mark.parametrize("mend", ["compact", "resume"])
@pytest.mark.slow
def test_a_swap_that_is_interrupted_anywhere_is_taken_up(complete, broker, monkeypatch, mend):
    run, plan = complete
    before, files, target = table_of(run, plan), dict(MemoryFileSystem.store), 3 * len(run.read(part_name(0)))
    for step in itertools.count(1, 2):
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(files)
        with monkeypatch.context() as patch:
            calls = itertools.count(1)
            for name in ("pipe_file", "copy", "rm_file"):
                patch.setattr(
                    MemoryFileSystem, name, dying(getattr(MemoryFileSystem, name), calls, range(step, step + 1))
                )
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


@pytest.mark.parametrize("planned_run", ["store"], indirect=True)
def test_a_retry_is_not_undone_by_an_interrupted_swap(complete, broker, serving, monkeypatch):
    run, plan = complete
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "copy", dying(MemoryFileSystem.copy, itertools.count(1), range(2, 99)))
        with pytest.raises(KeyboardInterrupt):
            compact(run, plan)
    queue = Queue(broker)
    assert retry(run, plan, queue) == (1, 0, 0)
    compacted = runs.resume(run, read_plan(run), queue)
    assert ([shard.index for shard in compacted.shards], run.committed()) == ([7], set())
    with serving():
        assert runs.wait(run, compacted, queue).ok == 20
    assert table_of(run, compacted)["doc_index"].to_pylist() == list(range(21))


@pytest.mark.parametrize(
    ("planned_run", "step", "call"),
    [
        ("disk", "_join", 2), ("disk", "_whole", 1), ("disk", "_exchange", 1),
        ("store", "_join", 2), ("store", "_begin", 1), ("store", "_files", 1),
    ],
    indirect=["planned_run"],
)  # fmt: skip
def test_of_two_compactions_that_overlap_none_loses_anything(complete, monkeypatch, step, call):
    run, plan = complete
    before, original, calls = table_of(run, plan), getattr(compacting, step), itertools.count(1)

    def overlapped(*arguments: Any) -> object:
        if next(calls) == call:
            compact(run, read_plan(run))
        return original(*arguments)

    monkeypatch.setattr(compacting, step, overlapped)
    with suppress(StoreError):
        compact(run, plan, 3 * len(run.read(part_name(0))))
    after = read_plan(run)
    assert len(after.shards) < len(plan.shards)
    assert table_of(run, after) == before
    assert run.committed() == run.shards() == {shard.index for shard in after.shards}
    assert (run.exists(SUCCESS_FILE), len(list(read_rejects(run, after)))) == (True, 1)
    assert left_aside(run) == []
    assert len(compact(run, after).shards) == 1


def test_a_second_compaction_takes_nothing_from_the_first(complete, monkeypatch):
    run, plan = complete
    before, size = table_of(run, plan), max(len(run.read(part_name(shard.index))) for shard in plan.shards)
    original, calls = compacting._join, itertools.count(1)

    def overlapped(*arguments: Any) -> object:
        call = next(calls)
        if call == 2:
            with pytest.raises(KeyboardInterrupt):
                compact(run, plan, 2 * size)
        if call == 4:  # the second's second
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(compacting, "_join", overlapped)
    compacted = compact(run, plan, 3 * size)
    assert (read_plan(run), table_of(run, compacted), left_aside(run)) == (compacted, before, [])
    assert run.committed() == run.shards() == {shard.index for shard in compacted.shards}


def left_aside(run: RunFolder) -> list[str]:
    if not run.is_local:
        return [name for name in MemoryFileSystem.store if name.startswith(run.path(compacting.ASIDE))]
    folder, name = os.path.split(run.uri)
    return [entry for entry in os.listdir(folder) if entry != name]


@pytest.fixture
def exchangeless(planned_run, complete, monkeypatch):
    def refuse(*_: str) -> None:
        raise OSError(errno.EINVAL, "renameat2")

    monkeypatch.setattr(compacting, "_exchange", refuse)
    return complete


@pytest.mark.parametrize("planned_run", ["disk"], indirect=True)
def test_a_disk_without_the_exchange_keeps_the_run(exchangeless, monkeypatch):
    run, plan = exchangeless
    before = table_of(run, plan)
    for step in (1, 2):
        with monkeypatch.context() as patch:
            error = PermissionError(errno.EACCES, "Permission denied")
            patch.setattr(os, "rename", dying(os.rename, itertools.count(1), range(step, step + 1), error))
            with pytest.raises(StoreError, match=r"cannot compact it \(Permission denied\); give this user access$"):
                compact(run, plan)
        assert (read_plan(run), table_of(run, plan), left_aside(run)) == (plan, before, [])
    compacted = compact(run, plan)
    assert (len(compacted.shards), table_of(run, compacted), left_aside(run)) == (1, before, [])


@pytest.mark.parametrize("planned_run", ["disk"], indirect=True)
@pytest.mark.parametrize(("name", "is_gone"), [("os.rename", True), ("shutil.rmtree", False)])
def test_a_swap_on_a_disk_without_the_exchange_is_taken_up(exchangeless, monkeypatch, name, is_gone):
    run, plan = exchangeless
    before = table_of(run, plan)
    with monkeypatch.context() as patch:
        method = os.rename if is_gone else shutil.rmtree
        patch.setattr(name, dying(method, itertools.count(1), range(1 + is_gone, 99)))
        with pytest.raises(KeyboardInterrupt):
            compact(run, plan)
    assert os.path.exists(run.uri) != is_gone
    assert finish_interrupted_swap(run) is None
    after = read_plan(run)
    assert (after == plan, table_of(run, after)) == (is_gone, before)
    assert len(compact(run, after).shards) == 1
    assert left_aside(run) == []


def dying(
    method: Callable[..., object], calls: Iterator[int], steps: range, error: BaseException | None = None
) -> Callable[..., object]:
    """The method, but the calls of these numbers are never made."""

    def call(*arguments: object, **keywords: object) -> object:
        if next(calls) in steps:
            raise error or KeyboardInterrupt
        return method(*arguments, **keywords)

    return call
