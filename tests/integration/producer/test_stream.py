"""A stream is tagged as it comes, and what was acknowledged is never lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nermill.producer.client import Producer
from nermill.producer.entities.show import read_rows
from nermill.producer.runs import run as runs
from nermill.producer.runs.base_stream import BACKLOG
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import look
from nermill.producer.runs.stream import Stream
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import read_plan
from tests.benchmarks import stream as latency
from tests.benchmarks.corpora import SAMPLE
from tests.doubles import store  # noqa: F401 - makes faulty:// known
from tests.harness import rows, texts


@pytest.fixture
def submit(broker: str, tmp_path: Path) -> Iterator[object]:
    started = []

    def submit(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nermill.producer.cli", "submit", *arguments]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out"), "--broker", broker, "--ack"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield submit
    for process in started:
        if process.poll() is None:
            process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream and not stream.closed:
                stream.close()
        process.wait()


def feed(process: subprocess.Popen[str], *texts: str) -> None:
    assert process.stdin is not None
    for text in texts:
        process.stdin.write(json.dumps({"id": text, "text": text}) + "\n")
    process.stdin.flush()


def the_run(tmp_path: Path, out: str = "out") -> RunFolder:
    [folder] = (tmp_path / out).glob("run=*")
    return RunFolder(str(folder))


def test_documents_are_tagged_while_the_stream_is_open(submit, serving, broker, tmp_path):
    process = submit("-", "--linger", "0.05", "--wait", "--json")
    with serving():
        feed(process, "Ada", "Bob")
        ack = json.loads(process.stdout.readline())
        assert (ack["index"], ack["first"]) == (0, 0)
        run = the_run(tmp_path)
        deadline = time.monotonic() + 10
        while not run.committed() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.committed()
        live = look(run, read_plan(run), Queue(broker))
        assert (live.state, live.exit_code) == ("running", 3)
        process.stdin.write('{"id": "broken"\n{"id": "late", "text": "Carol"}')
        process.stdin.close()
        process.stdin = None
        out, err = process.communicate(timeout=100)
    final = json.loads(out.splitlines()[-1])
    assert (process.returncode, final["state"]) == (3, "complete"), err
    assert final["documents"] == {"total": 4, "ok": 3, "rejected": 1}
    plan = read_plan(run)
    assert not plan.is_open
    assert [s.row["doc_id"] for s in read_rows(run, plan, None)] == ["Ada", "Bob", "-:3", "late"]


def test_ctrl_c_closes_cleanly_and_says_how_to_go_on(submit, serving, broker, tmp_path):
    process = submit("-", "--linger", "30", "--shard-documents", "2")
    assert "stream open" in process.stderr.readline()
    feed(process, "Ada", "Bob", "Carol")
    assert json.loads(process.stdout.readline())["documents"] == 2  # Carol came with them and waits
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()  # standard input stays open: its end would be another end
    assert process.wait(100) == 3
    run = the_run(tmp_path)
    assert f"nermill resume {run.uri}" in err
    assert json.loads(out)["documents"] == 1
    plan = read_plan(run)
    assert (plan.is_open, plan.documents) == (False, 3)
    with serving():
        assert runs.wait(run, plan, Queue(broker)).state == "complete"


@pytest.mark.parametrize("cut_by", [("--shard-documents", "1", "--linger", "60"), ("--linger", "0.05")])
def test_whoever_stops_reading_acknowledgements_is_told_how_to_go_on(submit, serving, broker, tmp_path, cut_by):
    process = submit("-", *cut_by)
    feed(process, "Ada")
    assert json.loads(process.stdout.readline())["documents"] == 1
    process.stdout.close()
    process.stdout = None
    feed(process, "Bob")  # and standard input stays open
    err = process.stderr.read()
    run = the_run(tmp_path)
    assert process.wait(100) == 1
    assert re.search(r"stopped; .* nermill resume .*/run=\w+\nnermill: standard output takes no more", err), err
    assert "Traceback" not in err
    with serving():
        queue, plan = Queue(broker), read_plan(run)
        queue.leave_stream(plan.run_id)  # it would run out within seconds
        plan = runs.resume(run, plan, queue)
        assert runs.wait(run, plan, queue).ok == 2


def test_a_stream_that_cannot_be_written_says_how_to_go_on(submit, tmp_path):
    process = submit("-", "--shard-documents", "1", "--linger", "60")
    feed(process, "Ada")
    assert process.stdout.readline()
    run = the_run(tmp_path)
    shutil.rmtree(run.path("_shards"))
    Path(run.path("_shards")).touch()
    feed(process, "Bob")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert f"nermill resume {run.uri}\n" in err


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_sigkill(submit, serving, broker, tmp_path):
    process = submit("-", "--linger", "0.05")
    acknowledged = 0
    for n in range(5):
        feed(process, f"Ada{n}", f"Bob{n}")
        acknowledged += json.loads(process.stdout.readline())["documents"]
    process.kill()
    process.wait()
    run = the_run(tmp_path)
    plan = read_plan(run)
    assert plan.is_open
    with serving():
        queue = Queue(broker)
        plan = runs.resume(run, plan, queue)
        assert runs.wait(run, plan, queue).ok >= acknowledged > 0
    assert not read_plan(run).is_open


@pytest.mark.slow
def test_a_stream_that_is_killed_and_started_again_misses_nothing_acknowledged(fleet, tmp_path):
    """The sender starts again behind what was acknowledged; the worker is a real one."""
    fleet.worker()
    documents = [json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts(300))]
    command = [sys.executable, "-m", "nermill.producer.cli", "submit", "-", "--ack", "--linger", "0.05"]
    command += ["--shard-documents", "7", "--out", str(fleet.out), "--broker", fleet.server.url]

    def start(**streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **streams)

    acknowledged = 0
    with start() as first:
        assert first.stdin is not None
        assert first.stdout is not None
        for number, document in enumerate(documents):
            first.stdin.write(document)
            first.stdin.flush()
            if number % 7 == 6:
                acknowledged += json.loads(first.stdout.readline())["documents"]
            if number == 200:  # some are in a shard to come
                first.kill()
                break
        acknowledged += sum(json.loads(line)["documents"] for line in first.stdout)
        with suppress(BrokenPipeError):
            first.stdin.close()
    assert 100 < acknowledged <= 201
    before = the_run(fleet.folder)
    with start() as second:
        told, _ = second.communicate("".join(documents[acknowledged:]), timeout=60)
    assert second.returncode == 0
    assert sum(json.loads(line)["documents"] for line in told.splitlines()[:-1] if "first" in line) > 0

    plan = runs.resume(before, read_plan(before), fleet.queue())
    fleet.wait(before, plan)
    (after,) = (RunFolder(str(path)) for path in fleet.out.iterdir() if str(path) != before.uri)
    fleet.wait(after, read_plan(after))
    durable = [row["doc_id"] for row in rows(before)]
    assert durable == [f"d{n}" for n in range(len(durable))]
    assert len(durable) >= acknowledged
    assert [row["doc_id"] for row in rows(after)] == [f"d{n}" for n in range(acknowledged, len(documents))]


def test_a_growing_file_is_followed(submit, serving, tmp_path):
    growing = tmp_path / "log.jsonl"
    growing.write_text('{"text": "Ada"}\n{"text": "Bo')
    process = submit(str(growing), "--follow", "--linger", "0.05")
    assert json.loads(process.stdout.readline())["documents"] == 1
    with growing.open("a") as stream:
        stream.write('b"}\n')
    run_id = read_plan(the_run(tmp_path)).run_id
    told = {"run_id": run_id, "index": 1, "first": 1, "documents": 1, "byte": growing.stat().st_size, "line": 2}
    assert json.loads(process.stdout.readline()) == told
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert read_plan(the_run(tmp_path)).documents == 2


@pytest.mark.parametrize(
    ("limits", "linger", "high_water", "most_shards"),
    [
        pytest.param(ShardLimits(tokens=1), 60.0, 3, 100, id="tokens"),
        pytest.param(ShardLimits(), 0.005, 3, 100, id="linger"),
        pytest.param(ShardLimits(tokens=1), 60.0, 1_000, 3, id="shards"),
    ],
)
def test_a_stream_without_workers_is_held_back(
    broker, serving, tmp_path, monkeypatch, limits, linger, high_water, most_shards
):
    monkeypatch.setattr("nermill.producer.runs.run.MAX_WAITING_SHARDS", most_shards)
    stream = Stream(str(tmp_path), Queue(broker), limits=limits, linger=linger, high_water=high_water)

    def send() -> None:
        for n in range(50):
            stream.add(Document(str(n), text="Ada"))
            time.sleep(0.02)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(2.0)
    held_at = stream.documents
    with serving():
        sender.join(30.0)
        plan = stream.close()
        assert runs.wait(stream.run, plan, Queue(broker)).ok == 50
    assert held_at < 50


def test_a_producer_that_is_held_back_is_still_there(broker, tmp_path, monkeypatch):
    monkeypatch.setattr("nermill.producer.runs.base_stream.HOLD_SECONDS", 0.3)
    producer = Producer(str(tmp_path), broker=broker, limits=ShardLimits(documents=1), high_water=1)

    def send() -> None:
        with suppress(UsageError):  # it is closed meanwhile
            for _ in range(20):
                producer.send("Ada")

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(1.0)
    assert sender.is_alive()
    [folder] = tmp_path.glob("run=*")
    assert Queue(broker).has_producer(read_plan(RunFolder(str(folder))).run_id)
    producer.close()  # whoever is held back goes on
    sender.join(10.0)
    assert not sender.is_alive()


def test_resume_leaves_a_living_stream_open(broker, tmp_path):
    queue = Queue(broker)
    stream = Stream(str(tmp_path), queue, linger=0.01)
    stream.add(Document("a", text="Ada"))
    stream.flush()
    assert runs.resume(stream.run, stream.plan, queue).is_open
    assert not stream.close().is_open


def test_a_server_that_lost_its_memory_is_told_again(broker, serving, tmp_path, monkeypatch):
    monkeypatch.setattr("nermill.producer.runs.base_stream.HOLD_SECONDS", 0.3)
    queue = Queue(broker)
    stream = Stream(str(tmp_path), queue, linger=0.01, limits=ShardLimits(documents=2))
    for n in range(4):
        stream.add(Document(str(n), text="Ada"))
    redis_client(broker).flushall()
    time.sleep(0.5)
    stream.add(Document("4", text="Ada"))
    plan = stream.close()
    with serving():
        assert runs.wait(stream.run, plan, queue).ok == 5


@pytest.mark.slow
def test_the_latency_table_has_a_row_for_each_linger(capfd, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency, "LINGERS", (0.05,))
    latency.main(["--rate", "40", "--seconds", "1", "--data", str(SAMPLE)])
    row = capfd.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| 50 ms \| 40 \| \d+ \| [\d,]+ ms \| [\d,]+ ms \| [\d,]+ ms \|", row)


def test_nobody_waits_for_a_slow_store_while_there_is_room(broker, tmp_path, monkeypatch):
    """Each shard takes the store a second; the lock is free meanwhile."""
    monkeypatch.setenv("FAULT_STORE", str(tmp_path))
    stream = Stream("faulty://out", Queue(broker), linger=60, limits=ShardLimits(documents=2))
    (tmp_path / ".fault").write_text("slow 1")
    longest = 0.0
    began = time.monotonic()
    for n in range(2 * BACKLOG):
        before = time.monotonic()
        stream.add(Document(str(n), text="Ada"))
        assert stream.documents == n + 1
        longest = max(longest, time.monotonic() - before)
    assert longest < 0.5
    assert time.monotonic() - began < 1.0
    assert len(stream.run.shards()) == 0  # the store is at work with the first
    for n in range(2 * BACKLOG, 2 * BACKLOG + 4):
        stream.add(Document(str(n), text="Ada"))
    assert time.monotonic() - began > 0.9  # memory is bounded: beyond the backlog the store's pace counts
    (tmp_path / ".fault").unlink()
    assert stream.close().documents == 2 * BACKLOG + 4


def test_a_stream_that_waits_does_not_poll(broker, tmp_path):
    """Its threads sleep until a document has lingered, and until the hold is due, every two seconds."""
    before = set(threading.enumerate())
    stream = Stream(str(tmp_path), Queue(broker), linger=30)
    stream.add(Document("a", text="Ada"))
    own = [thread.native_id for thread in set(threading.enumerate()) - before]
    assert len(own) == 2
    time.sleep(0.5)

    def wakeups() -> int:
        status = [Path(f"/proc/self/task/{thread}/status").read_text() for thread in own]
        return sum(int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE)[0]) for text in status)

    began = wakeups()
    time.sleep(3.0)
    assert wakeups() - began < 60  # two renewals of some calls each; a look every 10 ms would be 300
    stream.close()


def test_a_stream_ends_as_a_run_does_where_a_document_is_rejected(submit, serving, broker, tmp_path):
    process = submit("-")
    _, err = process.communicate('{"text": "Ada"}\n{"text": ', timeout=100)
    assert process.returncode == 3
    assert f"1 document rejected as unreadable: nermill rejects {the_run(tmp_path).uri}" in err


def test_a_closed_stream_takes_no_document(broker, tmp_path):
    stream = Stream(str(tmp_path), Queue(broker))
    stream.close()
    with pytest.raises(UsageError, match="was closed"):
        stream.add(Document("a", text="Ada"))


def test_threads_that_send_first_fill_one_stream(broker, tmp_path):
    with Producer(str(tmp_path), broker=broker) as producer:
        start = threading.Barrier(8)

        def send() -> None:
            start.wait()
            producer.send("Ada")

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert read_plan(the_run(tmp_path.parent, tmp_path.name)).documents == 8


def test_a_document_without_an_id_is_named_by_its_index(broker, serving, tmp_path):
    with Producer(str(tmp_path), broker=broker) as producer, serving():
        indices = [producer.send("Ada"), producer.send("Bob", id="mine"), producer.send(["Carol"])]
        producer.wait()
    assert indices == [0, 1, 2]
    run = RunFolder(producer.status().run)
    assert [shown.row["doc_id"] for shown in read_rows(run, read_plan(run), None)] == ["0", "mine", "2"]


def test_readers_of_an_open_run_see_nothing_half_done(broker, tmp_path):
    stream = Stream(str(tmp_path), Queue(broker), linger=60)
    stream.add(Document("a", text="Ada"))
    assert os.listdir(stream.run.uri) == ["_plan.json"]
    stream.close()
