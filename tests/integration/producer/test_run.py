"""A run through the real queue: sent once, followed, mended, cancelled, retried."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from nermill.producer.entities.show import conll_lines, read_rows
from nermill.producer.runs import run as runs
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.rejects import read_rejects, retry
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status, look
from nermill.producer.sources import ReadOptions
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.errors import BrokerError, StoreError, UsageError
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.records import Progress
from tests.harness import rows, texts
from tests.stand_in import next_claim

from .conftest import ARTIFACT, POISON, Serving

DOCUMENTS = 10


@pytest.fixture
def planned(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    texts = [f"Ada met nobody {n}" for n in range(DOCUMENTS - 2)] + [f"a {POISON}", ""]
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return make_plan(Request((str(path),), str(tmp_path / "out"), limits=ShardLimits(documents=3)))


def test_a_run_is_sent_followed_and_finished(broker, serving: Serving, planned):
    run, plan = planned
    queue = Queue(broker)
    assert runs.send(run, plan, queue) == 4
    assert look(run, plan, queue).state == "running"
    seen: list[Status] = []
    with serving():
        status = runs.wait(run, plan, queue, seen.append)
    assert run.exists(SUCCESS_FILE)
    assert status.as_json() | {"seconds": 0, "documents_per_second": 0, "tokens_per_second": 0, "workers": 0} == {
        "run": run.uri, "run_id": plan.run_id, "state": "complete",
        "shards": {"planned": 4, "committed": 4, "waiting": 0, "leased": 0}, "at_work": {"tokens": 0, "computed": 0},
        "documents": {"total": 10, "ok": 8, "rejected": 2}, "tokens": 35, "seconds": 0, "documents_per_second": 0,
        "tokens_per_second": 0, "padding_share": 0.5, "eta_seconds": 0.0, "workers": 0, "listening": [], "trouble": "",
    }  # fmt: skip
    assert status.exit_code == 3
    assert seen[-1].state == "complete"
    assert [shown.row["doc_id"] for shown in read_rows(run, plan, None)] == [f"d{n}" for n in range(DOCUMENTS)]
    assert list(next(read_rows(run, plan, 1)).pieces()) == [("Ada", "PER"), (" met nobody 0", "")]


def messages_in(broker):
    """All messages that lie in queues, parsed."""
    client = redis_client(broker)
    lists = [key for key in client.keys("nermill*") if client.type(key) == "list"]
    return [json.loads(entry) for key in lists for entry in client.lrange(key, 0, -1)]


def test_messages_are_json_and_name_one_shard_each(broker, planned):
    run, plan = planned
    plan = replace(plan, model={"name": "art", "sha256": "a" * 64})
    runs.send(run, plan, Queue(broker))
    messages = messages_in(broker)
    assert {message["content-type"] for message in messages} == {"application/json"}
    assert {message["headers"]["task"] for message in messages} == {"nermill.tag_shard"}
    bodies = [json.loads(b64decode(message["body"]))[0] for message in messages]
    assert sorted(bodies) == [[plan.run_id, run.uri, 0], [plan.run_id, run.uri, 1]], "the window without workers is two"


def test_sending_again_changes_nothing(broker, serving, planned):
    run, plan = planned
    queue = Queue(broker)
    assert [runs.send(run, plan, queue), runs.send(run, plan, queue)] == [4, 0]
    with serving():
        runs.wait(run, plan, queue)
        stamps = {s: (Path(run.uri) / part_name(s)).stat().st_mtime_ns for s in run.committed()}
        assert runs.resume(run, plan, queue) == plan
        assert runs.wait(run, plan, queue).state == "complete"
    assert stamps == {s: (Path(run.uri) / part_name(s)).stat().st_mtime_ns for s in run.committed()}


def test_resume_sends_only_what_has_no_part(broker, serving, planned):
    run, plan = planned
    queue = Queue(broker)
    with serving():
        runs.send(run, plan, queue)
        runs.wait(run, plan, queue)
    for name in (part_name(2), SUCCESS_FILE):
        run.remove(name)
    assert look(run, plan, queue).state == "incomplete"
    assert look(run, plan).exit_code == 3
    assert runs.send(run, plan, queue) == 1
    with serving():
        assert runs.wait(run, plan, queue).state == "complete"


def await_end(ledger: Ledger, plan: Plan) -> Progress:
    """What the ledger says once the run is finished, or after ten seconds."""
    deadline = time.monotonic() + 10
    while (told := ledger.progress(plan.run_id)).state != "finished" and time.monotonic() < deadline:
        time.sleep(0.01)
    return told


@pytest.mark.parametrize(
    "call", [(Ledger, "done"), (runs, "open_ledger"), (runs, "send_shards")], ids=lambda call: call[1]
)
def test_a_run_that_ends_while_it_is_sent_again_stays_ended(broker, serving, planned, monkeypatch, call):
    run, plan = planned
    queue, (owner, name) = Queue(broker), call
    runs.send(run, plan, queue)
    original = getattr(owner, name)

    def late(*arguments, **named):
        monkeypatch.setattr(owner, name, original)
        with serving() as ledger:
            await_end(ledger, plan)
        runs.finish(run, plan, queue)  # as the run's last step does
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, late)
    with monkeypatch.context() as patch:
        forget, remove = Mock(side_effect=Ledger.forget), Mock(side_effect=RunFolder.remove)
        patch.setattr(Ledger, "forget", lambda *arguments: forget(*arguments))
        patch.setattr(RunFolder, "remove", lambda *arguments: remove(*arguments))
        assert runs.send(run, plan, queue) == 0
    with serving() as ledger:
        progress = await_end(ledger, plan)
    assert (progress.state, progress.done) == ("finished", 4)
    assert run.exists(SUCCESS_FILE)
    assert not forget.called, "its parts are there"
    assert SUCCESS_FILE not in [removed.args[1] for removed in remove.call_args_list]


def test_wait_mends_a_ledger_that_was_lost(broker, serving, planned):
    run, plan = planned
    queue = Queue(broker)
    runs.send(run, plan, queue)
    redis_client(broker).flushall()
    with serving():
        assert runs.wait(run, plan, queue).state == "complete"


def test_cancel_keeps_parts_and_resume_goes_on(broker, serving, planned):
    run, plan = planned
    queue = Queue(broker)
    runs.send(run, plan, queue)
    plan = runs.cancel(run, plan, queue)
    with serving():
        status = runs.wait(run, plan, queue)
        assert (status.state, status.committed, status.exit_code) == ("cancelled", 0, 3)
        plan = runs.resume(run, plan, queue)
        assert not runs.open_run(run.uri)[1].cancelled
        assert runs.wait(run, plan, queue).state == "complete"
    assert runs.cancel(run, plan, queue) == plan


def test_a_run_is_sent_by_a_name_that_workers_in_other_folders_understand(planned, monkeypatch):
    run, _ = planned
    monkeypatch.chdir(Path(run.uri).parent)
    name = Path(run.uri).name
    for said in (name, f"{name}/", f"./{name}", f"file://{run.uri}"):
        assert runs.open_run(said)[0].uri == run.uri


def test_the_same_input_with_another_output_is_another_run_for_the_workers(broker, serving, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "Ada"}\n' * 10)
    queue = Queue(broker)
    both = [make_plan(Request((str(path),), str(tmp_path / out))) for out in ("one", "two")]
    for run, plan in both:
        runs.send(run, plan, queue)
    with serving():
        assert [runs.wait(run, plan, queue).state for run, plan in both] == ["complete", "complete"]


def test_back_pressure_waits_for_the_workers(broker, serving, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_BATCH", 1)
    monkeypatch.setattr(runs, "_POLL_SECONDS", (0.01, 0.02))
    path = tmp_path / "in.txt"
    path.write_text("Ada\n" * 40)
    limits = ShardLimits(documents=4)
    run, plan = make_plan(Request((str(path),), str(tmp_path / "out"), read=ReadOptions(lines=True), limits=limits))
    waits: list[Status] = []
    queue = Queue(broker)
    sender = threading.Thread(target=runs.send, args=(run, plan, queue, 8, waits.append))
    sender.start()
    deadline = time.monotonic() + 10
    while len(waits) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sender.is_alive()
    assert Ledger(redis_client(broker)).progress(plan.run_id).unfinished_documents <= 12
    with serving():
        sender.join(20)
        assert runs.wait(run, plan, queue).state == "complete"
    assert max(s.progress.unfinished_documents for s in waits) <= 12


def test_rejects_are_listed_and_tried_again(broker, serving, planned):
    run, plan = planned
    queue = Queue(broker)
    runs.send(run, plan, queue)
    with serving():
        runs.wait(run, plan, queue)
        rows = list(read_rejects(run, plan))
        assert [(r["doc_index"], r["doc_id"], r["reason"], r["attempts"]) for r in rows] == [
            (8, "d8", "model_failure", 1), (9, "d9", "empty", 1),
        ]  # fmt: skip
        before = (Path(run.uri) / part_name(2)).stat().st_mtime_ns
        assert retry(run, plan, queue) == (1, 1, 0)
        assert runs.wait(run, plan, queue).rejected == 2
    assert (Path(run.uri) / part_name(2)).stat().st_mtime_ns != before
    assert len(list(read_rejects(run, plan))) == 2


def test_a_folder_that_workers_refuse_ends_the_waiting(broker, planned):
    run, plan = planned
    queue = Queue(broker)
    runs.send(run, plan, queue)
    ledger = Ledger(redis_client(broker))
    while claim := next_claim(ledger, ARTIFACT):
        ledger.quarantine(claim, "outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS")
    with pytest.raises(StoreError, match="NERMILL_ALLOWED_ROOTS"):
        runs.wait(run, plan, queue)


def test_documents_that_are_gone_are_named(broker, planned):
    run, plan = planned
    run.remove(run.shard_file(1))
    with pytest.raises(UsageError, match=r"shard-00001.arrow: these documents are gone"):
        runs.send(run, plan, Queue(broker))


def test_a_damaged_shard_is_named_and_submitting_again_mends_it(fleet):
    documents = texts(30)
    run, plan = fleet.plan(documents, documents_per_shard=10)
    damaged = bytearray(run.read(run.shard_file(1)))
    damaged[len(damaged) // 2] ^= 1
    run.write(run.shard_file(1), bytes(damaged))
    queue = fleet.queue()
    runs.send(run, plan, queue)
    fleet.worker()
    named = r"shard-00001.arrow: damaged since it was planned .*; submit the same input again"
    with pytest.raises(StoreError, match=named):
        fleet.wait(run, plan)
    status = look(run, plan, queue)
    assert (status.state, status.committed) == ("incomplete", 2)
    assert re.search(named, status.progress.last_error)
    again = fleet.submit(documents, documents_per_shard=10)
    assert again == (run, plan)
    assert fleet.wait(run, plan).state == "complete"
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(30)]


def test_a_broker_that_is_not_there_is_one_line_without_its_password():
    with pytest.raises(BrokerError) as caught:
        Queue("redis://:secret@localhost:1/0")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conll_goes_in_and_out(broker, serving, tmp_path):
    path = tmp_path / "in.conll"
    path.write_text("Ada B-PER\nis O\n\nhere O\n")
    run, plan = make_plan(Request((str(path),), str(tmp_path / "out")))
    queue = Queue(broker)
    runs.send(run, plan, queue)
    with serving():
        runs.wait(run, plan, queue)
    assert "\n".join(conll_lines(run, plan, None)) == "Ada B-PER\nis O\n\nhere O\n"


def test_every_format_ends_in_the_same_entities(broker, serving, tmp_path):
    texts = ["Ada met Bob", "no one", "Carol \U0001f980 Dan"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("\n".join(texts))
    (tmp_path / "c.conll").write_text("\n".join("".join(f"{w} O\n" for w in text.split(" ")) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    inputs = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    run, plan = make_plan(Request(inputs, str(tmp_path / "out"), read=ReadOptions(lines=True)))
    assert [entry.format for entry in plan.inputs] == ["jsonl", "text", "conll", "parquet", "jsonl"]
    queue = Queue(broker)
    runs.send(run, plan, queue)
    with serving():
        runs.wait(run, plan, queue)
    entities = [[e["text"] for e in shown.row["entities"]] for shown in read_rows(run, plan, None)]
    assert entities == [["Ada", "Bob"], [], ["Carol", "Dan"]] * 5
