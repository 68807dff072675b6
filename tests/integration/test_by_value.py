"""Documents by value: the producer reaches the broker alone, the workers fill the run's folder."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nermill.producer.client import Producer
from nermill.producer.runs import by_value
from nermill.producer.runs.planning import Request
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status
from nermill.worker.contracts.by_value import MAX_UNPACKED_BYTES, Documents
from nermill.worker.contracts.errors import BrokerError, StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import Shard, read_plan
from tests.harness import Harness, rows, table_of, texts

pytestmark = pytest.mark.timeout(300)
NOBODY = 65534
MEETS_ROOT = os.getuid() == 0
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def without_the_rights_of_root() -> None:
    """In a child before it runs a program: files of others are closed to it as to any user."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError("capabilities cannot be dropped")


@contextmanager
def nermill(mill: Harness, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of the producer that sees nothing of the workers' output."""
    with subprocess.Popen(
        [sys.executable, "-m", "nermill.producer.cli", *arguments],
        env={**os.environ, "NERMILL_BROKER_URL": mill.server.url},
        preexec_fn=without_the_rights_of_root if MEETS_ROOT else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(mill: Harness, *arguments: str, timeout: float = 90) -> tuple[int, str, str]:
    """Exit code and outputs of such a command."""
    with nermill(mill, *arguments) as process:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err


@pytest.fixture
def closed(mill: Harness) -> tuple[str, Path, dict[str, str]]:
    """Where runs go that the producer cannot see: as it names it, as a folder, and the worker's environment."""
    folder = mill.folder / "closed"
    folder.mkdir(mode=0o700)
    if MEETS_ROOT:
        os.chown(folder, NOBODY, NOBODY)
        return str(folder), folder, {"NERMILL_ALLOWED_ROOTS": str(folder)}
    # a scheme that the worker alone knows
    return (
        "faulty://bucket",
        folder / "bucket",
        {"FAULT_STORE": str(folder), "NERMILL_ALLOWED_ROOTS": "faulty://bucket"},
    )


def run_below(folder: Path) -> RunFolder:
    (run,) = folder.glob("run=*")
    return RunFolder(str(run))


def documents_in_redis(mill: Harness) -> list[str]:
    with mill.server.client() as client:
        return [key for key in client.keys("*") if key.endswith("documents")]


def test_a_producer_that_may_not_see_the_output_is_killed_and_submits_again(
    mill: Harness, closed: tuple[str, Path, dict[str, str]]
) -> None:
    out, folder, environment = closed
    source = str(mill.source(texts(10_000)))
    submit = ["submit", source, "--out", out, "--by-value", "--shard-documents", "32"]
    with mill.server.client() as client:
        with nermill(mill, *submit) as producer:
            mill.until(lambda: client.keys(f"{KEY_PREFIX}run:*:documents"))
            (key,) = client.keys(f"{KEY_PREFIX}run:*:documents")
            run_id = key.split(":")[3]
            mill.until(lambda: client.hlen(key) > 60)
            producer.kill()
            producer.wait()
        planned, arrived = client.hlen(f"{KEY_PREFIX}run:{run_id}:shards"), client.hlen(key)
        assert planned == 313
        assert 60 < arrived < planned, "killed while it sent"
    run = f"{out}/run={run_id}"
    assert not list(folder.rglob("*")), "the producer wrote nothing"
    mill.worker(**environment)
    mill.until(lambda: folder.exists() and len(list(folder.rglob("part-*"))) == arrived)
    code, answer, _ = told(mill, "status", run, "--json")
    assert (code, json.loads(answer)["state"]) == (3, "incomplete")
    assert json.loads(answer)["shards"]["planned"] == planned
    before = {part: part.stat().st_ino for part in folder.rglob("part-*")}

    code, answer, err = told(mill, *submit, "--wait", "--json")
    assert code == 0, err + mill.logs()
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
    assert not documents_in_redis(mill)
    code, answer, _ = told(mill, "status", run, "--json")
    assert (code, json.loads(answer)["state"]) == (0, "complete")
    again = told(mill, *submit, "--wait", "--json")
    assert again[0] == 0, again
    assert {part: part.stat().st_ino for part in before} == before


def submit(mill: Harness, count: int = 200, per_shard: int = 20, **options: Any) -> tuple[RunFolder, Any]:
    """Sends a run by value from this process."""
    request = Request((str(mill.source(texts(count))),), str(mill.out), limits=ShardLimits(documents=per_shard))
    with by_value.packed(request) as packed:
        by_value.send(packed, mill.queue(), **options)
    return packed.run, packed.plan


def test_the_table_is_that_of_a_run_by_reference(mill: Harness) -> None:
    mill.worker()
    run, plan = submit(mill)
    assert by_value.wait(run, plan, mill.queue()).state == "complete"
    other, other_plan = mill.submit(texts(200), documents_per_shard=20)
    mill.wait(other, other_plan)
    assert other.uri != run.uri
    assert table_of(run, read_plan(run)).equals(table_of(other, other_plan))


def test_submitting_again_after_the_server_lost_everything_tags_nothing_twice(mill: Harness) -> None:
    mill.worker(FAULT_BATCH_SECONDS="0.05")
    run, _ = submit(mill, 600)
    mill.until(lambda: len(run.committed()) >= 5)
    with mill.server.client() as client:
        client.flushall()
    before = {name: Path(run.path(name)).stat().st_ino for name in run.list() if name.startswith("part-")}
    assert len(before) < 30
    run, plan = submit(mill, 600)
    assert by_value.wait(run, plan, mill.queue()).ok == 600
    assert {name: Path(run.path(name)).stat().st_ino for name in before} == before
    assert sorted(row["doc_index"] for row in rows(run)) == list(range(600))
    assert read_plan(run).documents == 600


@pytest.mark.parametrize("step", ["sync", "rename", "done", "ack"])
def test_a_worker_that_dies_on_the_way_leaves_a_shard_to_the_next(mill: Harness, step: str) -> None:
    once = mill.folder / "once"
    first = mill.worker(FAULT_DIE_AT=step, FAULT_ONCE_FILE=str(once))
    run, plan = submit(mill, 60)
    assert first.process.wait(60) == -signal.SIGKILL
    mill.worker()
    assert by_value.wait(run, plan, mill.queue()).ok == 60
    assert sorted(row["doc_index"] for row in rows(run)) == list(range(60))
    assert not documents_in_redis(mill)


def test_parts_that_were_removed_are_tagged_again_when_the_input_is_submitted_again(mill: Harness) -> None:
    mill.worker()
    run, plan = submit(mill)
    by_value.wait(run, plan, mill.queue())
    run.remove("part-00003.parquet")
    run, plan = submit(mill)
    with pytest.raises(StoreError, match="1 parts are missing"):
        by_value.wait(run, plan, mill.queue())
    assert not run.exists("_SUCCESS")
    run, plan = submit(mill)
    by_value.wait(run, plan, mill.queue())
    assert len(rows(run)) == 200
    assert run.exists("_SUCCESS")


def test_sending_waits_while_too_much_lies_in_redis(mill: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mill.source(texts(400))
    monkeypatch.setattr(by_value, "HELD_BYTES", 20_000)
    largest = 0

    class EnoughError(Exception):
        pass

    def look(status: Status) -> None:
        nonlocal largest
        with mill.queue().ledger() as ledger:
            largest = max(largest, Documents(ledger).held(status.run_id).own)
        if not mill.workers:
            raise EnoughError

    with pytest.raises(EnoughError):
        submit(mill, 400, per_shard=4, on_wait=look)
    assert 20_000 < largest < 25_000
    mill.worker(FAULT_BATCH_SECONDS="0.02")
    run, plan = submit(mill, 400, per_shard=4, on_wait=look)
    assert largest < 25_000
    assert by_value.wait(run, plan, mill.queue()).ok == 400
    assert source.exists()


def test_a_run_that_is_not_served_does_not_keep_another_from_sending(
    mill: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_value, "HELD_BYTES", 20_000)
    with mill.server.client() as client:
        client.set(f"{KEY_PREFIX}run:other:documents", "x")
        client.zadd(f"{KEY_PREFIX}documents", {"other": 1e9, "forgotten": 1e9})
        mill.worker()
        run, plan = submit(mill, 100, per_shard=4)
        assert by_value.wait(run, plan, mill.queue()).ok == 100
        assert client.zrange(f"{KEY_PREFIX}documents", 0, -1) == ["other"], "what was forgotten leaves the index"


def test_the_limit_follows_the_memory_of_the_server(mill: Harness) -> None:
    assert by_value._limit(mill.queue()) == by_value.HELD_BYTES
    with mill.server.client() as client:
        client.config_set("maxmemory", "40mb")
    assert by_value._limit(mill.queue()) == 10 << 20


def test_a_cancelled_or_forgotten_run_leaves_no_documents(mill: Harness) -> None:
    run, plan = submit(mill)
    assert documents_in_redis(mill)
    with mill.server.client() as client:
        assert 0 < client.ttl(f"{KEY_PREFIX}run:{plan.run_id}:documents") <= 7 * 86400
    code, answer, err = told(mill, "cancel", run.uri, "--json")
    assert code == 0, err
    assert json.loads(answer)["state"] == "cancelled"
    assert not documents_in_redis(mill)
    run, plan = submit(mill)
    assert documents_in_redis(mill)
    mill.queue().drop(plan.run_id)
    assert not documents_in_redis(mill)
    with pytest.raises(BrokerError, match="lost the run; submit the same input again"):
        by_value.wait(run, plan, mill.queue())


def test_gold_tags_and_scores_come_back_by_the_broker(mill: Harness, closed: tuple[str, Path, dict[str, str]]) -> None:
    out, folder, environment = closed
    source = mill.folder / "gold.conll"
    source.write_text("Ada B-PER\nmet O\n\nin O\nLondon B-LOC\n\nx y z w v\n\n" * 20)
    mill.worker(**environment)
    code, answer, err = told(mill, "submit", str(source), "--out", out, "--by-value", "--wait", "--json")
    assert code == 3, err + mill.logs()  # finished with rejects
    status = json.loads(answer)
    assert set(status["scores"]) >= {"f1", "strict"}
    assert status["documents"] == {"total": 60, "ok": 40, "rejected": 20}
    assert run_below(folder).exists("_report.html")


def test_python_submits_by_value(mill: Harness) -> None:
    mill.worker()
    with Producer(str(mill.out), broker=mill.server.url, by_value=True) as producer:
        run = producer.submit(str(mill.source(texts(50))))
        assert producer.wait(run).ok == 50
        assert producer.status(run).state == "complete"
        with pytest.raises(UsageError, match="submit files by value"):
            producer.send("Ada met Charles.")


# Wrong input: one clear line


def test_a_document_that_is_too_large_is_a_reject_or_ends_the_command(mill: Harness) -> None:
    source = mill.folder / "large.jsonl"
    large = {"id": "large", "text": "Ada.", "noise": base64.b64encode(os.urandom(1_500_000)).decode()}
    records = [{"id": "a", "text": "Ada"}, large, {"id": "b", "text": "B"}]
    source.write_text("\n".join(map(json.dumps, records)))
    arguments = ["submit", str(source), "--out", str(mill.out), "--by-value", "--keep-fields"]
    code, out, err = told(mill, *arguments, "--on-error", "fail")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert "large: " in err
    assert "1048576 is the limit of a shard by value" in err
    mill.worker()
    code, out, err = told(mill, *arguments, "--wait", "--json")
    assert code == 3, err
    found = {row["doc_id"]: row["reject_reason"] for row in rows(run_below(mill.out))}
    assert found == {"a": None, "large": "too_large", "b": None}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--priority", "urgent"], "--priority 'urgent': one of high, normal, low"),
        (["--new"], "--new looks at the runs below OUT"),
        (["--follow"], "--by-value sends files"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_a_wrong_option_is_one_line(mill: Harness, more: list[str], expected: str) -> None:
    source = str(mill.source(texts(3)))
    code, out, err = told(mill, "submit", source, "--out", str(mill.out), "--by-value", *more)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert expected in err
    assert not documents_in_redis(mill)


def test_a_folder_outside_the_roots_is_one_line(mill: Harness) -> None:
    mill.worker()
    elsewhere = mill.folder / "elsewhere"
    source = str(mill.source(texts(3)))
    code, out, err = told(mill, "submit", source, "--out", str(elsewhere), "--by-value", "--wait")
    assert (code, out) == (1, "")
    assert "outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not elsewhere.exists()
    assert not documents_in_redis(mill)


def test_a_run_that_did_not_arrive_whole_is_not_resumed_from_its_folder(mill: Harness) -> None:
    mill.worker()
    run, plan = submit(mill, 40)
    by_value.wait(run, plan, mill.queue())
    read_plan(run).write(run)
    open_again = {**json.loads(run.read("_plan.json")), "is_open": True, "shards": []}
    run.write("_plan.json", json.dumps(open_again).encode())
    mill.queue().drop(plan.run_id)
    code, out, err = told(mill, "resume", run.uri)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith("to go on, submit the same input again")


# Whoever can write to the broker: nothing of another run changes, no memory fills


def refusal(mill: Harness, run: RunFolder, plan: Any) -> str:
    with pytest.raises(StoreError) as caught:
        by_value.wait(run, plan, mill.queue())
    return str(caught.value)


def test_another_runs_folder_takes_no_documents(mill: Harness) -> None:
    other, other_plan = mill.submit(texts(64))
    run, plan = submit(mill, 20)
    with mill.server.client() as client:
        client.hset(f"{KEY_PREFIX}run:{plan.run_id}", "uri", other.uri)
    mill.worker()
    mill.wait(other, other_plan)
    assert "holds another run, which was not submitted by value" in refusal(mill, run, plan)
    assert other.committed() == {0}
    assert other.shards() == {0}


def test_a_folder_of_another_name_takes_none(mill: Harness) -> None:
    run, plan = submit(mill, 20)
    with mill.server.client() as client:
        client.hset(f"{KEY_PREFIX}run:{plan.run_id}", "uri", f"{mill.out}/data")
    mill.worker()
    assert "a run by value lies in a folder run=" in refusal(mill, run, plan)
    assert not (mill.out / "data").exists()


def test_a_shard_that_is_there_is_not_replaced(mill: Harness) -> None:
    run, plan = submit(mill, 20)
    run.write(run.shard_file(0), b"another one")
    mill.worker()
    assert "holds other documents than those that were sent, and is not replaced" in refusal(mill, run, plan)
    assert run.read(run.shard_file(0)) == b"another one"
    assert not run.committed()


BOMB = zstandard.compress(b'{"doc_id":["' + b"a" * (8 * MAX_UNPACKED_BYTES))


@pytest.mark.parametrize(
    "documents",
    [b"", b"no zstd", zstandard.compress(b"[]"), zstandard.compress(b"[" * 100_000), BOMB, bytes(3 << 20)],
    ids=["empty", "noise", "list", "deep", "bomb", "long"],
)
def test_documents_that_do_not_fit_are_refused(mill: Harness, documents: bytes) -> None:
    run, plan = submit(mill, 20)
    mill.queue().drop(plan.run_id)
    with mill.queue().ledger() as ledger:
        ledger.open(plan.run_id, run.uri, plan.options, plan=plan)
        wrong = Shard(0, 0, 20, hashlib.sha256(documents).hexdigest())
        Documents(ledger).declare(plan.run_id, [wrong])
        Documents(ledger).offer(plan.run_id, wrong, documents or b"x")
    mill.queue().promote()
    worker = mill.worker()
    assert "its documents do not fit" in refusal(mill, run, plan)
    assert worker.is_alive
    assert not Path(run.uri).exists()
    assert not documents_in_redis(mill)
