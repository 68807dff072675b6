"""The last step of a run that no worker ends: a producer's, leased as a worker's is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest

from nermill.producer.local.broker import embedded_broker
from nermill.producer.runs import run as runs
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.rejects import retry
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream import Stream
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.part import mark_complete
from nermill.worker.contracts.plan import Plan, Shard, read_plan
from nermill.worker.contracts.records import Claim, RunState, WorkerProcess
from tests.stand_in import next_claim

from .conftest import ARTIFACT, POISON, tag

WORKER = WorkerProcess("w", "cpu", "m", ARTIFACT)


@pytest.fixture
def queue(broker: str) -> Queue:
    return Queue(broker)


@pytest.fixture
def ledger(broker: str) -> Ledger:
    return Ledger(redis_client(broker))


@pytest.fixture
def tagged(queue: Queue, ledger: Ledger, tmp_path: Path) -> tuple[RunFolder, Plan]:
    """A run of three shards, each of them recorded; its last step is due."""
    source = tmp_path / "in.jsonl"
    texts = ["Ada", f"a {POISON}", "Grace"]
    source.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)))
    run, plan = make_plan(Request((str(source),), str(tmp_path / "out"), limits=ShardLimits(documents=1)))
    runs.send(run, plan, queue)
    for _ in plan.shards:
        claim = next_claim(ledger, ARTIFACT)
        assert claim is not None
        tag(claim, ledger)
    return run, plan


@contextmanager
def held(queue: Queue, run_id: str) -> Iterator[None]:
    """Another producer holds the run, and goes on to."""
    stop = threading.Event()

    def hold() -> None:
        while not stop.wait(0.1):
            assert queue.hold_stream(run_id, "another")

    assert queue.hold_stream(run_id, "another")
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        queue.leave_stream(run_id, "another")


def test_it_is_done_where_no_worker_does_it(queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan]) -> None:
    run, plan = tagged
    assert runs.finish(run, plan, queue)
    assert run.exists(SUCCESS_FILE)
    assert ledger.progress(plan.run_id).state == RunState.FINISHED
    assert runs.finish(run, plan, queue), "a repeated call does nothing"


def test_it_is_left_to_the_worker_that_holds_it(queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan]) -> None:
    run, plan = tagged
    claim = ledger.lease(plan.run_id, None, WORKER, 60)
    assert isinstance(claim, Claim)
    assert not runs.finish(run, plan, queue)
    assert not runs.cancel(run, plan, queue).cancelled, "all of it is tagged"
    assert not run.exists(SUCCESS_FILE)
    assert ledger.close(plan.run_id, claim), "its worker still holds it"


def test_it_is_not_done_while_another_producer_may_change_the_run(
    queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan]
) -> None:
    run, plan = tagged
    with held(queue, plan.run_id):
        assert not runs.finish(run, plan, queue)
        with pytest.raises(UsageError, match="another producer"):
            retry(run, plan, queue)
    assert not run.exists(SUCCESS_FILE)
    assert runs.finish(run, plan, queue)


@pytest.mark.parametrize("change", ["more shards", "a part less"])
def test_a_run_that_was_changed_before_it_was_leased_is_not_marked(
    queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run, plan = tagged
    lease = Ledger.lease

    def late(self: Ledger, *arguments: object, **options: bool) -> Claim | str:
        if change == "more shards":
            replace(plan, is_open=True).write(run)
        else:
            run.remove(part_name(1))
        return lease(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "lease", late)
    assert not runs.finish(run, plan, queue)
    assert not run.exists(SUCCESS_FILE)
    assert ledger.progress(plan.run_id).leased == 0, "it is given back"


def test_who_lost_the_lease_marks_nothing(
    queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = tagged

    def late(*arguments: object) -> None:
        ledger.add(plan.run_id, [replace(plan.shards[-1], index=3)])
        mark_complete(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "mark_complete", late)
    assert not runs.finish(run, plan, queue)
    assert not run.exists(SUCCESS_FILE)


def test_a_run_that_is_marked_ends_the_waiting_whether_its_broker_is_there_or_not(serving, broker, tmp_path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "Ada"}\n')
    run, plan = make_plan(Request((str(source),), str(tmp_path / "out")))
    runs.send(run, plan, Queue(broker))
    with serving():
        runs.wait(run, plan, Queue(broker))
    with embedded_broker() as url:
        gone = Queue(url)
    assert runs.wait(run, plan, gone).state == "complete"


def test_a_part_that_is_not_recorded_is_not_taken_away_for_another_try(
    queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan]
) -> None:
    run, plan = tagged
    ledger.forget(plan.run_id, 1)  # as if its worker had been stopped between part and record
    ledger.add(plan.run_id, [plan.shards[1]])
    claim = next_claim(ledger, ARTIFACT)
    assert claim is not None
    assert claim.shard == plan.shards[1]
    assert retry(run, plan, queue) == (0, 0, 1)
    tag(claim, ledger)
    assert run.committed() == {0, 1, 2}
    assert runs.finish(run, plan, queue)
    assert retry(run, plan, queue) == (1, 0, 0)
    assert run.committed() == {0, 2}
    assert not run.exists(SUCCESS_FILE)
    assert queue.hold_stream(plan.run_id, "the next one"), "nobody holds it any more"


def test_parts_stay_where_the_hold_on_their_run_was_lost(
    queue: Queue, tagged: tuple[RunFolder, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = tagged
    assert runs.finish(run, plan, queue)
    reopen = Queue.reopen

    def late(self: Queue, *arguments: object) -> None:
        reopen(self, *arguments)  # type: ignore[arg-type]
        self.leave_stream(plan.run_id)

    monkeypatch.setattr(Queue, "reopen", late)
    with pytest.raises(StoreError, match="give the command again"):
        retry(run, plan, queue)
    assert run.exists(SUCCESS_FILE)
    assert run.committed() == {0, 1, 2}


def test_a_stream_that_was_closed_meanwhile_tells_its_producer(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nermill.producer.runs.base_stream.HOLD_SECONDS", 0.3)
    stream = Stream(str(tmp_path), queue, linger=0.01)
    stream.add(Document("a", text="Ada"))
    stream.flush()
    with queue.ledger() as ledger:
        ledger.seal(stream.plan.run_id)
    with pytest.raises(StoreError, match="the stream is closed: somebody else ended it"):
        stream.close()
    assert read_plan(stream.run).is_open, "whoever closed it has written the plan"


def test_what_a_producer_wrote_before_it_was_gone_is_part_of_its_stream(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(str(tmp_path), queue, linger=0.01)
    stream.add(Document("a", text="Ada"))
    stream.flush()
    has_producer = Queue.has_producer

    def ends_meanwhile(self: Queue, run_id: str) -> bool:
        if not stream.is_closed:
            stream.add(Document("b", text="Grace"))
            stream.close()
            replace(stream.plan, is_open=True, shards=()).write(stream.run)  # as if it had been killed before its end
        return has_producer(self, run_id)

    monkeypatch.setattr(Queue, "has_producer", ends_meanwhile)
    plan = runs.resume(stream.run, replace(stream.plan, is_open=True, shards=()), queue)
    assert not plan.is_open
    assert [shard.documents for shard in plan.shards] == [1, 1]


def short_holds(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for name in ("hold_stream", "renew_hold"):
        monkeypatch.setattr(Queue, name, partialmethod(getattr(Queue, name), seconds=seconds))


def abandoned(queue: Queue, out: Path, shards: int) -> Stream:
    """A stream whose producer was killed."""
    stream = Stream(str(out), queue, limits=ShardLimits(documents=1), linger=0.01)
    for number in range(shards):
        stream.add(Document(str(number), text="Ada"))
    stream.close()
    queue.drop(stream.plan.run_id)
    replace(stream.plan, is_open=True, shards=()).write(stream.run)
    return stream


def test_a_stream_is_closed_though_its_shards_are_read_for_longer_than_a_hold(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = abandoned(queue, tmp_path, 5)
    short_holds(monkeypatch, 0.4)
    read = RunFolder.read

    def slow(self: RunFolder, name: str) -> bytes:
        time.sleep(0.2 if "shard-" in name else 0)
        return read(self, name)

    monkeypatch.setattr(RunFolder, "read", slow)
    assert len(runs.resume(stream.run, stream.plan, queue).shards) == 5


def test_a_producer_that_goes_on_while_its_stream_is_closed_keeps_it_open(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = abandoned(queue, tmp_path, 1)
    closed = Plan.closed

    def late(self: Plan, shards: list[Shard]) -> Plan:
        renew = Queue.renew_hold

        def again(self: Queue, run_id: str, holder: str) -> bool:
            monkeypatch.setattr(Queue, "renew_hold", lambda *_: False)  # the next time, after the plan
            return renew(self, run_id, holder)

        monkeypatch.setattr(Queue, "renew_hold", again)
        return closed(self, shards)

    monkeypatch.setattr(Plan, "closed", late)
    with pytest.raises(StoreError, match="give the command again"):
        runs.resume(stream.run, stream.plan, queue)
    assert read_plan(stream.run).is_open


def test_a_plan_from_before_a_stream_went_on_does_not_close_it(queue: Queue, ledger: Ledger, tmp_path: Path) -> None:
    stream = Stream(str(tmp_path), queue, linger=0.01)
    stream.add(Document("a", text="Ada"))
    stream.flush()
    assert runs.resume(stream.run, stream.plan.closed([]), queue).is_open
    assert ledger.progress(stream.plan.run_id).state == RunState.OPEN
    stream.close()


def test_a_try_that_is_interrupted_leaves_the_last_step_due(
    queue: Queue, ledger: Ledger, tagged: tuple[RunFolder, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = tagged

    def interrupted(_: RunFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nermill.producer.runs.rejects.unmark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        retry(run, plan, queue)
    assert ledger.progress(plan.run_id).state == RunState.FINISHING
    claim = next_claim(ledger, ARTIFACT)
    assert claim is not None
    assert claim.shard is None


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_part_that_no_plan_names_ends_the_waiting(
    queue: Queue, tagged: tuple[RunFolder, Plan], monkeypatch: pytest.MonkeyPatch, is_marked: bool
) -> None:
    run, plan = tagged
    monkeypatch.setattr(runs, "SETTLE_SECONDS", 0.2)
    if is_marked:
        assert runs.finish(run, plan, queue)
    run.write(part_name(9), run.read(part_name(0)))
    if is_marked:
        plan = runs.resume(run, plan, queue)
        assert runs.wait(run, plan, queue).state == "complete"
    else:
        with pytest.raises(StoreError, match=r"part-00009\.parquet: not named by its plan"):
            runs.wait(run, plan, queue)
