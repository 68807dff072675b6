"""Documents by value: the producer reaches the broker alone, the workers fill the run's folder."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nermill.producer.client import Producer
from nermill.producer.runs import by_value
from nermill.producer.runs.planning import Request
from nermill.producer.runs.run import wait
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status
from nermill.worker.contracts.by_value import MAX_UNPACKED_BYTES, Documents
from nermill.worker.contracts.errors import BrokerError, StoreError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import Shard, read_plan
from tests.harness import Harness, rows, table_of, texts
from tests.unseen import closed_place, documents_in_redis, nermill, run_below, told

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def closed(fleet: Harness) -> tuple[str, Path, dict[str, str]]:
    """Where runs go that the producer cannot see: as it names it, as a folder, and the worker's environment."""
    return closed_place(fleet)


@pytest.mark.slow
def test_a_producer_that_may_not_see_the_output_is_killed_and_submits_again(
    fleet: Harness, closed: tuple[str, Path, dict[str, str]]
) -> None:
    out, folder, environment = closed
    source = str(fleet.source(texts(10_000)))
    submit = ["submit", source, "--out", out, "--by-value", "--shard-documents", "32"]
    with fleet.server.client() as client:
        with nermill(fleet, *submit) as producer:
            fleet.until(lambda: client.keys(f"{KEY_PREFIX}run:*:documents"))
            (key,) = client.keys(f"{KEY_PREFIX}run:*:documents")
            run_id = key.split(":")[3]
            fleet.until(lambda: client.hlen(key) > 60)
            producer.kill()
            producer.wait()
        planned, arrived = client.hlen(f"{KEY_PREFIX}run:{run_id}:shards"), client.hlen(key)
        assert planned == 313
        assert 60 < arrived < planned, "killed while it sent"
    run = f"{out}/run={run_id}"
    assert not list(folder.rglob("*")), "the producer wrote nothing"
    fleet.worker(**environment)
    fleet.until(lambda: folder.exists() and len(list(folder.rglob("part-*"))) == arrived)
    code, answer, _ = told(fleet, "status", run, "--json")
    assert (code, json.loads(answer)["state"]) == (3, "incomplete")
    assert json.loads(answer)["shards"]["planned"] == planned
    before = {part: part.stat().st_ino for part in folder.rglob("part-*")}

    code, answer, err = told(fleet, *submit, "--wait", "--json")
    assert code == 0, err + fleet.logs()
    status = json.loads(answer)
    assert (status["run"], status["state"]) == (run, "complete")
    assert status["documents"] == {"total": 10_000, "ok": 10_000, "rejected": 0}
    assert status["documents_per_second"] > 0
    assert {part: part.stat().st_ino for part in before} == before, "what was in the table is not tagged again"
    seen = run_below(folder)
    assert [row["doc_id"] for row in sorted(rows(seen), key=lambda row: row["doc_index"])] == [
        f"d{n}" for n in range(10_000)
    ]
    plan = read_plan(seen)
    assert not plan.is_open
    assert plan.documents == table_of(seen, plan).num_rows == 10_000
    assert seen.exists("_SUCCESS")
    assert not documents_in_redis(fleet)
    code, answer, _ = told(fleet, "status", run, "--json")
    assert (code, json.loads(answer)["state"]) == (0, "complete")
    again = told(fleet, *submit, "--wait", "--json")
    assert again[0] == 0, again
    assert {part: part.stat().st_ino for part in before} == before


def submit(fleet: Harness, count: int = 200, per_shard: int = 20, **options: Any) -> tuple[RunFolder, Any]:
    """Sends a run by value from this process."""
    request = Request((str(fleet.source(texts(count))),), str(fleet.out), limits=ShardLimits(documents=per_shard))
    with by_value.packed(request) as packed:
        by_value.send(packed, fleet.queue(), **options)
    return packed.run, packed.plan


def test_the_table_is_that_of_a_run_by_reference(fleet: Harness) -> None:
    fleet.worker()
    run, plan = submit(fleet)
    assert wait(run, plan, fleet.queue()).state == "complete"
    other, other_plan = fleet.submit(texts(200), documents_per_shard=20)
    fleet.wait(other, other_plan)
    assert other.uri != run.uri
    assert table_of(run, read_plan(run)).equals(table_of(other, other_plan))


def test_submitting_again_after_the_server_lost_everything_tags_nothing_twice(fleet: Harness) -> None:
    fleet.worker(FAULT_BATCH_SECONDS="0.05")
    run, _ = submit(fleet, 600)
    fleet.until(lambda: len(run.committed()) >= 5)
    with fleet.server.client() as client:
        client.flushall()
    before = {name: Path(run.path(name)).stat().st_ino for name in run.list() if name.startswith("part-")}
    assert len(before) < 30
    run, plan = submit(fleet, 600)
    assert wait(run, plan, fleet.queue()).ok == 600
    assert {name: Path(run.path(name)).stat().st_ino for name in before} == before
    assert sorted(row["doc_index"] for row in rows(run)) == list(range(600))
    assert read_plan(run).documents == 600


@pytest.mark.parametrize("step", ["sync", "rename", "done", "ack"])
@pytest.mark.slow
def test_a_worker_that_dies_on_the_way_leaves_a_shard_to_the_next(fleet: Harness, step: str) -> None:
    once = fleet.folder / "once"
    first = fleet.worker(FAULT_DIE_AT=step, FAULT_ONCE_FILE=str(once))
    run, plan = submit(fleet, 60)
    assert first.process.wait(60) == -signal.SIGKILL
    fleet.worker()
    assert wait(run, plan, fleet.queue()).ok == 60
    assert sorted(row["doc_index"] for row in rows(run)) == list(range(60))
    assert not documents_in_redis(fleet)


def test_parts_that_were_removed_are_tagged_again_when_the_input_is_submitted_again(fleet: Harness) -> None:
    fleet.worker()
    run, plan = submit(fleet)
    wait(run, plan, fleet.queue())
    run.remove("part-00003.parquet")
    run, plan = submit(fleet)
    with pytest.raises(StoreError, match="1 parts are missing"):
        wait(run, plan, fleet.queue())
    assert not run.exists("_SUCCESS")
    run, plan = submit(fleet)
    wait(run, plan, fleet.queue())
    assert len(rows(run)) == 200
    assert run.exists("_SUCCESS")


@pytest.mark.slow
def test_sending_waits_while_too_much_lies_in_redis(fleet: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fleet.source(texts(400))
    monkeypatch.setattr(by_value, "HELD_BYTES", 20_000)
    largest = 0

    class EnoughError(Exception):
        pass

    def look(status: Status) -> None:
        nonlocal largest
        with fleet.queue().ledger() as ledger:
            largest = max(largest, Documents(ledger).held(status.run_id).own)
        if not fleet.workers:
            raise EnoughError

    with pytest.raises(EnoughError):
        submit(fleet, 400, per_shard=4, on_wait=look)
    assert 20_000 < largest < 25_000
    fleet.worker(FAULT_BATCH_SECONDS="0.02")
    run, plan = submit(fleet, 400, per_shard=4, on_wait=look)
    assert largest < 25_000
    assert wait(run, plan, fleet.queue()).ok == 400
    assert source.exists()


def test_a_run_that_is_not_served_does_not_keep_another_from_sending(
    fleet: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_value, "HELD_BYTES", 20_000)
    with fleet.server.client() as client:
        client.set(f"{KEY_PREFIX}run:other:documents", "x")
        client.zadd(f"{KEY_PREFIX}documents", {"other": 1e9, "forgotten": 1e9})
        fleet.worker()
        run, plan = submit(fleet, 100, per_shard=4)
        assert wait(run, plan, fleet.queue()).ok == 100
        assert client.zrange(f"{KEY_PREFIX}documents", 0, -1) == ["other"], "what was forgotten leaves the index"


def test_the_limit_follows_the_memory_of_the_server(fleet: Harness) -> None:
    assert by_value.byte_limit(fleet.queue()) == by_value.HELD_BYTES
    with fleet.server.client() as client:
        client.config_set("maxmemory", "40mb")
    assert by_value.byte_limit(fleet.queue()) == 10 << 20


def test_a_cancelled_or_forgotten_run_leaves_no_documents(fleet: Harness) -> None:
    run, plan = submit(fleet)
    assert documents_in_redis(fleet)
    with fleet.server.client() as client:
        assert 0 < client.ttl(f"{KEY_PREFIX}run:{plan.run_id}:documents") <= 7 * 86400
    code, answer, err = told(fleet, "cancel", run.uri, "--json")
    assert code == 0, err
    assert json.loads(answer)["state"] == "cancelled"
    assert not documents_in_redis(fleet)
    run, plan = submit(fleet)
    assert documents_in_redis(fleet)
    fleet.queue().drop(plan.run_id)
    assert not documents_in_redis(fleet)
    with pytest.raises(BrokerError, match="lost the run; submit the same input again"):
        wait(run, plan, fleet.queue())


def test_gold_tags_and_scores_come_back_by_the_broker(fleet: Harness, closed: tuple[str, Path, dict[str, str]]) -> None:
    out, folder, environment = closed
    source = fleet.folder / "gold.conll"
    source.write_text("Ada B-PER\nmet O\n\nin O\nLondon B-LOC\n\nx y z w v\n\n" * 20)
    fleet.worker(**environment)
    code, answer, err = told(fleet, "submit", str(source), "--out", out, "--by-value", "--wait", "--json")
    assert code == 3, err + fleet.logs()  # finished with rejects
    status = json.loads(answer)
    assert set(status["scores"]) >= {"f1", "strict"}
    assert status["documents"] == {"total": 60, "ok": 40, "rejected": 20}
    assert run_below(folder).exists("_report.html")


def test_python_submits_by_value(fleet: Harness) -> None:
    fleet.worker()
    with Producer(str(fleet.out), broker=fleet.server.url, by_value=True) as producer:
        run = producer.submit(str(fleet.source(texts(50))))
        assert producer.wait(run).ok == 50
        assert producer.status(run).state == "complete"


# Wrong input: one clear line


def test_a_document_that_is_too_large_is_a_reject_or_ends_the_command(fleet: Harness) -> None:
    source = fleet.folder / "large.jsonl"
    large = {"id": "large", "text": "Ada.", "noise": base64.b64encode(os.urandom(1_500_000)).decode()}
    records = [{"id": "a", "text": "Ada"}, large, {"id": "b", "text": "B"}]
    source.write_text("\n".join(map(json.dumps, records)))
    arguments = ["submit", str(source), "--out", str(fleet.out), "--by-value", "--keep-fields"]
    code, out, err = told(fleet, *arguments, "--on-error", "fail")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert "large: " in err
    assert "1048576 is the limit of a shard by value" in err
    code, out, err = told(fleet, *arguments)
    assert code == 3, err
    assert "1 document rejected as unreadable" in err
    fleet.worker()
    code, out, err = told(fleet, *arguments, "--wait", "--json")
    assert code == 3, err
    found = {row["doc_id"]: row["reject_reason"] for row in rows(run_below(fleet.out))}
    assert found == {"a": None, "large": "too_large", "b": None}


def test_records_that_cannot_be_read_are_told_when_they_are_sent(fleet: Harness) -> None:
    source = fleet.folder / "broken.jsonl"
    source.write_text('{"id": "a", "text": "Ada"}\n{"id": "b"\n')
    arguments = ["submit", str(source), "--json"]
    by_value = told(fleet, *arguments, "--out", str(fleet.out), "--by-value")
    by_reference = told(fleet, *arguments, "--out", str(fleet.folder / "other"))
    for code, out, err in (by_value, by_reference):
        assert code == 3, err
        assert f"1 document rejected as unreadable: nermill rejects {json.loads(out)['run']}" in err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--priority", "urgent"], "--priority 'urgent': one of high, normal, low"),
        (["--new"], "--new looks at the runs below OUT"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--resume", "out/run=r"], "--resume goes on with a stream"),
        (["--out", ""], "Missing option '--out'"),
    ],
)
def test_a_wrong_option_is_one_line(fleet: Harness, more: list[str], expected: str) -> None:
    source = str(fleet.source(texts(3)))
    code, out, err = told(fleet, "submit", source, "--out", str(fleet.out), "--by-value", *more)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert expected in err
    assert not documents_in_redis(fleet)


def test_a_folder_outside_the_roots_is_one_line(fleet: Harness) -> None:
    fleet.worker()
    elsewhere = fleet.folder / "elsewhere"
    source = str(fleet.source(texts(3)))
    code, out, err = told(fleet, "submit", source, "--out", str(elsewhere), "--by-value", "--wait")
    assert (code, out) == (1, "")
    assert "outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not elsewhere.exists()
    assert not documents_in_redis(fleet)


def test_a_run_that_did_not_arrive_whole_is_not_resumed_from_its_folder(fleet: Harness) -> None:
    fleet.worker()
    run, plan = submit(fleet, 40)
    wait(run, plan, fleet.queue())
    read_plan(run).write(run)
    open_again = {**json.loads(run.read("_plan.json")), "is_open": True, "shards": []}
    run.write("_plan.json", json.dumps(open_again).encode())
    fleet.queue().drop(plan.run_id)
    code, out, err = told(fleet, "resume", run.uri)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith("to go on, submit the same input again")


# Whoever can write to the broker: nothing of another run changes, no memory fills


def refusal(fleet: Harness, run: RunFolder, plan: Any) -> str:
    with pytest.raises(StoreError) as caught:
        wait(run, plan, fleet.queue())
    return str(caught.value)


def test_another_runs_folder_takes_no_documents(fleet: Harness) -> None:
    other, other_plan = fleet.submit(texts(64))
    run, plan = submit(fleet, 20)
    with fleet.server.client() as client:
        client.hset(f"{KEY_PREFIX}run:{plan.run_id}", "uri", other.uri)
    fleet.worker()
    fleet.wait(other, other_plan)
    assert "holds another run, which was not submitted by value" in refusal(fleet, run, plan)
    assert other.committed() == {0}
    assert other.shards() == {0}


def test_a_folder_of_another_name_takes_none(fleet: Harness) -> None:
    run, plan = submit(fleet, 20)
    with fleet.server.client() as client:
        client.hset(f"{KEY_PREFIX}run:{plan.run_id}", "uri", f"{fleet.out}/data")
    fleet.worker()
    assert "a run by value lies in a folder run=" in refusal(fleet, run, plan)
    assert not (fleet.out / "data").exists()


def test_a_shard_that_is_there_is_not_replaced(fleet: Harness) -> None:
    run, plan = submit(fleet, 20)
    run.write(run.shard_file(0), b"another one")
    fleet.worker()
    assert "holds other documents than those that were sent, and is not replaced" in refusal(fleet, run, plan)
    assert run.read(run.shard_file(0)) == b"another one"
    assert not run.committed()


BOMB = zstandard.compress(b'{"doc_id":["' + b"a" * (8 * MAX_UNPACKED_BYTES))


@pytest.mark.parametrize(
    "documents",
    [b"", b"no zstd", zstandard.compress(b"[]"), zstandard.compress(b"[" * 100_000), BOMB, bytes(3 << 20)],
    ids=["empty", "noise", "list", "deep", "bomb", "long"],
)
def test_documents_that_do_not_fit_are_refused(fleet: Harness, documents: bytes) -> None:
    run, plan = submit(fleet, 20)
    fleet.queue().drop(plan.run_id)
    with fleet.queue().ledger() as ledger:
        ledger.open(plan.run_id, run.uri, plan.options, plan=plan)
        wrong = Shard(0, 0, 20, hashlib.sha256(documents).hexdigest())
        Documents(ledger).declare(plan.run_id, [wrong])
        Documents(ledger).offer(plan.run_id, wrong, documents or b"x")
    fleet.queue().promote()
    worker = fleet.worker()
    assert "its documents do not fit" in refusal(fleet, run, plan)
    assert worker.is_alive
    assert not Path(run.uri).exists()
    assert not documents_in_redis(fleet)
