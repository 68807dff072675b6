"""Streams by value: lines travel through the broker, and are acknowledged once a worker has stored them."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nermill.producer.client import Producer
from nermill.producer.runs import by_value
from nermill.producer.runs.run import wait
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream_by_value import StreamByValue
from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import BrokerError, StoreError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import read_plan
from tests.harness import Harness, rows, texts
from tests.unseen import closed_place, documents_in_redis, nermill, run_below, told

pytestmark = pytest.mark.timeout(400)
Place = tuple[str, Path, dict[str, str]]
KILLS = 3
PATIENCE = 240  # seconds for a command on a slow machine
LINES, SHARD = 4_000, 50


@pytest.fixture
def closed(fleet: Harness) -> Place:
    """Where runs go that the producer cannot see: as it names it, as a folder, and the worker's environment."""
    return closed_place(fleet)


@contextmanager
def submitting(
    fleet: Harness, out: str, source: Path, *options: object, follow: bool = False, ends: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """``submit -`` of a file's lines, or ``submit --follow`` of the file, by value and with acknowledgements.

    Args:
        ends: Whether standard input ends behind those lines.
    """
    given = [str(source), "--follow"] if follow else ["-"]
    words = ["submit", *given, "--out", out, "--by-value", "--ack", *map(str, options)]
    with source.open() as lines, nermill(fleet, *words, stdin=lines if ends else subprocess.PIPE) as process:
        if process.stdin and not follow:
            process.stdin.write(lines.read())
            process.stdin.flush()
        yield process


def acknowledgement(process: subprocess.Popen[str]) -> dict[str, int]:
    line = process.stdout.readline() if process.stdout else ""
    assert line, process.stderr and process.stderr.read()
    told: dict[str, int] = json.loads(line)
    return told


def only_run(fleet: Harness) -> str:
    """Id of the one run that the ledger knows."""
    with fleet.server.client() as client:
        (key,) = [key for key in client.keys(f"{KEY_PREFIX}run:*") if key.count(":") == KEY_PREFIX.count(":") + 1]
    return str(key).rpartition(":")[2]


def end_hold(fleet: Harness) -> None:
    """What a killed producer held of a stream runs out now, and not seconds later."""
    with fleet.server.client() as client:
        client.delete(f"{KEY_PREFIX}stream:{only_run(fleet)}")


def is_held(fleet: Harness) -> bool:
    with fleet.server.client() as client:
        return bool(client.exists(f"{KEY_PREFIX}stream:{only_run(fleet)}"))


def sent(fleet: Harness) -> int:
    """Shards whose documents came to the broker, of all runs."""
    with fleet.server.client() as client:
        return sum(client.hlen(key) for key in client.keys(f"{KEY_PREFIX}run:*:shards"))


def assert_each_line_once(run: RunFolder, lines: int) -> None:
    found = sorted(rows(run), key=lambda row: row["doc_index"])
    assert [row["doc_id"] for row in found] == [f"d{n}" for n in range(lines)]
    assert [row["doc_index"] for row in found] == list(range(lines))
    plan = read_plan(run)
    assert (plan.is_open, plan.documents, plan.inputs[0].documents) == (False, lines, lines)
    assert run.exists("_SUCCESS")


@pytest.mark.parametrize("follow", [True, False], ids=["follow", "stdin"])
@pytest.mark.slow
def test_each_line_is_once_in_the_table_whatever_kills_the_producer(
    fleet: Harness, closed: Place, follow: bool
) -> None:
    out, folder, environment = closed
    fleet.worker(**environment, FAULT_BATCH_SECONDS="0.05", NERMILL_CONCURRENCY="2")
    source, chance = fleet.source(texts(LINES)), random.Random(20)
    lines = source.read_text().splitlines(keepends=True)
    acknowledged: list[dict[str, Any]] = []
    for kill in range(KILLS + 1):
        is_last = kill == KILLS
        known = LINES if is_last else (kill + 1) * LINES // (KILLS + 1) + chance.randint(0, 200)
        source.write_text("".join(lines[:known]))
        goes_on = ["--resume", f"{out}/run={only_run(fleet)}"] if kill and not follow else []
        options = ["--shard-documents", SHARD, "--linger", 60, *goes_on]
        with submitting(fleet, out, source, *options, follow=follow, ends=is_last) as process:
            told = [acknowledgement(process) for _ in range(chance.randint(3, 8))]
            for ack in told:
                assert ack["index"] in run_below(folder).shards(), "durable is what lies in the folder"
            if is_last:
                while told[-1]["first"] + told[-1]["documents"] < LINES:
                    told.append(acknowledgement(process))
                if follow:
                    process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=PATIENCE)
                assert process.returncode == 0, err
            else:
                process.kill()
                told += [json.loads(line) for line in process.stdout or () if line.endswith("\n")]
                assert process.wait() == -signal.SIGKILL
        if acknowledged:
            assert told[0]["first"] >= acknowledged[-1]["first"], "where it goes on"
        acknowledged += told
    run_id = only_run(fleet)
    assert {ack["run_id"] for ack in acknowledged} == {run_id}
    content = source.read_bytes()
    for ack in acknowledged:
        before = content[: ack["byte"]].splitlines()
        assert len(before) == ack["line"]
        assert json.loads(before[-1])["id"] == f"d{ack['first'] + ack['documents'] - 1}"
    code, answer, err = told_of(fleet, f"{out}/run={run_id}")
    assert (code, answer["state"]) == (0, "complete"), err
    assert_each_line_once(run_below(folder), LINES)
    assert not documents_in_redis(fleet)


def told_of(fleet: Harness, run: str) -> tuple[int, dict[str, str], str]:
    """``status`` of a run at its end."""
    code, out, err = told(fleet, "status", run, "--watch", "--json")
    return code, json.loads(out), err


@pytest.mark.slow
def test_a_stream_that_was_killed_before_a_worker_came_goes_on_with_what_it_sent(fleet: Harness, closed: Place) -> None:
    out, folder, environment = closed
    source = fleet.source(texts(100))
    options = ["--linger", "60", "--shard-documents"]
    with submitting(fleet, out, source, *options, 30) as process:
        fleet.until(lambda: sent(fleet) == 4)  # three full ones, and the last
        process.kill()
        assert process.communicate()[0] == "", "nothing is durable"
    end_hold(fleet)
    assert not list(folder.rglob("*"))
    run = f"{out}/run={only_run(fleet)}"
    with source.open("a") as more:
        more.write(json.dumps({"id": "d100", "text": "Ada"}) + "\n")
    with submitting(fleet, out, source, *options, 40, "--resume", run, "--wait", "--json") as process:
        fleet.until(lambda: is_held(fleet))  # it has looked what is durable
        fleet.worker(**environment)
        answer, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err + fleet.logs()
    acks = [json.loads(line) for line in answer.splitlines()]
    assert [ack["documents"] for ack in acks[:-1]] == [30, 30, 30, 10, 1], "cut where it was cut before"
    assert acks[-1]["documents"] == {"total": 101, "ok": 101, "rejected": 0}
    assert_each_line_once(run_below(folder), 101)


def test_a_broker_that_loses_its_memory_is_told_again(fleet: Harness) -> None:
    fleet.worker(FAULT_BATCH_SECONDS="0.05")
    acknowledged: list[int] = []
    stream = StreamByValue(
        str(fleet.out),
        fleet.queue(),
        limits=ShardLimits(documents=10),
        linger=60,
        on_shard=lambda shard, _: acknowledged.append(shard.index),
    )
    for number, text in enumerate(texts(300)):
        stream.add(Document(f"d{number}", text=text))
        if number == 150:
            fleet.until(lambda: len(acknowledged) > 3)
            with fleet.server.client() as client:
                client.flushall()
    plan = stream.close()
    assert acknowledged == list(range(30))
    status = wait(stream.run, plan, fleet.queue(), send_again=stream.send_again)
    assert (status.state, status.ok) == ("complete", 300)
    assert_each_line_once(stream.run, 300)


def test_a_broker_that_loses_its_memory_after_the_end_is_told_again(fleet: Harness) -> None:
    worker = fleet.worker(FAULT_BATCH_SECONDS="0.2")
    stream = StreamByValue(str(fleet.out), fleet.queue(), limits=ShardLimits(documents=5))
    for number, text in enumerate(texts(60)):
        stream.add(Document(f"d{number}", text=text))
    plan = stream.close()
    worker.kill()
    assert len(stream.run.shards()) == 12
    with fleet.server.client() as client:
        client.flushall()
    with pytest.raises(BrokerError, match="lost the run"):
        wait(stream.run, plan, fleet.queue())
    fleet.worker()
    assert wait(stream.run, plan, fleet.queue(), send_again=stream.send_again).ok == 60
    assert_each_line_once(stream.run, 60)


@pytest.mark.slow
def test_a_stream_waits_while_too_much_lies_in_redis(fleet: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "HELD_BYTES", 20_000)
    stream = StreamByValue(str(fleet.out), fleet.queue(), limits=ShardLimits(documents=4), linger=60)
    largest = 0

    def held() -> int:
        nonlocal largest
        with fleet.queue().ledger() as ledger:
            now = Documents(ledger).held(stream.plan.run_id).own
        largest = max(largest, now)
        return now

    def send() -> None:
        for number, text in enumerate(texts(1_000)):
            stream.add(Document(f"d{number}", text=text))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        fleet.until(lambda: held() > 20_000)
        assert stream.documents < 1_000
    finally:
        fleet.worker(FAULT_BATCH_SECONDS="0.01")
        fleet.until(lambda: held() >= 0 and not sender.is_alive())
    plan = stream.close()
    assert 20_000 < largest < 25_000
    assert wait(stream.run, plan, fleet.queue()).ok == 1_000
    assert_each_line_once(stream.run, 1_000)


@pytest.mark.slow
def test_an_abandoned_stream_is_closed_with_what_was_sent(fleet: Harness, closed: Place) -> None:
    out, folder, environment = closed
    source = fleet.source(texts(25))
    with submitting(fleet, out, source, "--shard-documents", 10, "--linger", 60, follow=True) as process:
        fleet.until(lambda: sent(fleet) == 2)
        process.kill()
        process.wait()
    end_hold(fleet)
    run = f"{out}/run={only_run(fleet)}"
    fleet.worker(**environment)
    code, answer, err = told(fleet, "resume", run, "--wait", "--json")
    assert code == 0, err + fleet.logs()
    assert json.loads(answer)["documents"] == {"total": 20, "ok": 20, "rejected": 0}
    assert_each_line_once(run_below(folder), 20)
    with submitting(fleet, out, source, "--shard-documents", 10, follow=True) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert err.splitlines()[-1].endswith("a stream by value does not go on after its end; name another --out")


def test_an_empty_stream_ends_complete(fleet: Harness, closed: Place) -> None:
    out, folder, environment = closed
    fleet.worker(**environment)
    with submitting(fleet, out, fleet.source([]), "--wait", "--json") as process:
        answer, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err + fleet.logs()
    assert json.loads(answer)["documents"] == {"total": 0, "ok": 0, "rejected": 0}
    assert_each_line_once(run_below(folder), 0)


@pytest.mark.slow
def test_a_stream_that_is_cancelled_ends_and_goes_on_when_it_is_resumed(fleet: Harness, closed: Place) -> None:
    out, folder, environment = closed
    source = fleet.source(texts(30))
    with submitting(fleet, out, source, "--shard-documents", 10) as process:
        fleet.until(lambda: sent(fleet) == 3)
        run = f"{out}/run={only_run(fleet)}"
        assert told(fleet, "cancel", run)[0] == 0
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "the stream is cancelled" in err.splitlines()[-1]
    assert f"nermill submit - --by-value --resume {run} < THE SAME INPUT" in err
    assert not documents_in_redis(fleet)
    end_hold(fleet)
    code, _, err = told(fleet, "resume", run)
    assert code == 2
    assert f"give the same input again: nermill submit - --by-value --resume {run}" in err
    fleet.worker(**environment)
    with submitting(fleet, out, source, "--shard-documents", 10, "--resume", run, "--wait", "--json") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert_each_line_once(run_below(folder), 30)


def test_python_sends_by_value(fleet: Harness) -> None:
    fleet.worker()
    with Producer(str(fleet.out), broker=fleet.server.url, by_value=True, linger=0.05) as producer:
        for number, text in enumerate(texts(40)):
            assert producer.send(text, id=f"d{number}") == number
        producer.flush()
        run = run_below(fleet.out)
        assert run.shards(), "what was flushed is durable"
        assert producer.status().state == "running"
        assert producer.wait().ok == 40
    assert_each_line_once(run, 40)


def test_what_cannot_be_tagged_is_rejected(fleet: Harness) -> None:
    source = fleet.folder / "large.jsonl"
    large = {"id": "d1", "text": "Ada.", "noise": base64.b64encode(os.urandom(1_500_000)).decode()}
    records = [{"id": "d0", "text": "Ada"}, large, None, {"id": "d3", "text": "B"}]
    source.write_text("\n".join('{"id": ' if record is None else json.dumps(record) for record in records))
    fleet.worker()
    with submitting(fleet, str(fleet.out), source, "--keep-fields") as process:
        answer, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, err
    assert "2 documents rejected as unreadable" in err
    lines = [json.loads(line)["line"] for line in answer.splitlines() if line.startswith("{")]
    assert (lines[-1], lines) == (4, sorted(lines))
    fleet.until(lambda: run_below(fleet.out).exists("_SUCCESS"))
    found = [(row["doc_id"], row["reject_reason"]) for row in rows(run_below(fleet.out))]
    assert found == [("d0", None), ("d1", "too_large"), ("-:3", "malformed"), ("d3", None)]


# Wrong input and refusals: one clear line


def test_a_second_producer_is_refused(fleet: Harness, closed: Place) -> None:
    out, _, _ = closed
    source = fleet.source(texts(10))
    with submitting(fleet, out, source, follow=True) as first:
        fleet.until(lambda: sent(fleet) == 1)
        first.kill()
        first.wait()
    with fleet.server.client() as client:
        client.set(f"{KEY_PREFIX}stream:{only_run(fleet)}", "one that never lets go")
    with submitting(fleet, out, source, follow=True) as second:
        _, err = second.communicate(timeout=PATIENCE)
    assert (second.returncode, len(err.splitlines())) == (2, 1)
    assert "another producer fills this stream" in err


def test_a_producer_that_was_thought_dead_sends_nothing_into_its_heirs_stream(fleet: Harness) -> None:
    stream = StreamByValue(str(fleet.out), fleet.queue(), limits=ShardLimits(documents=1), linger=60)
    with fleet.server.client() as client:
        client.set(f"{KEY_PREFIX}stream:{stream.plan.run_id}", "the heir")
    stream.add(Document("d0", text="Ada"))
    with pytest.raises(StoreError, match="another producer goes on"):
        stream.flush()
    assert sent(fleet) == 0


@pytest.fixture
def killed(fleet: Harness, closed: Place) -> tuple[str, Path]:
    """A stream whose producer was killed: its run, and its input."""
    source = fleet.source(texts(30))
    with submitting(fleet, closed[0], source, "--shard-documents", 10) as process:
        fleet.until(lambda: sent(fleet) == 3)
        process.kill()
        process.wait()
    end_hold(fleet)
    return f"{closed[0]}/run={only_run(fleet)}", source


WRONG = {
    "other options": (["--overlap", "32"], "was begun with overlap 64, not 32"),
    "another model": (["--model", "demo"], "give the same --model"),
    "an edited input": ([], "its first"),
    "a shorter input": ([], "ends before byte"),
    "no such run": ([], "the broker knows no such stream by value"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_one_line_and_nothing_is_sent(fleet: Harness, killed: tuple[str, Path], case: str) -> None:
    run, source = killed
    more, message = WRONG[case]
    if case == "an edited input":
        source.write_text(source.read_text().replace("Ada", "Bob"))
    elif case == "a shorter input":
        source.write_text("".join(source.read_text().splitlines(keepends=True)[:15]))
    elif case == "no such run":
        run += "x"
    with fleet.server.client() as client:
        before = {key: client.hgetall(key) for key in client.keys(f"{KEY_PREFIX}run:*:documents")}
        out = run.rpartition("/")[0]
        with submitting(fleet, out, source, "--shard-documents", 10, "--resume", run, *more) as process:
            answer, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, answer) == (2, ""), err
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err
        assert before == {key: client.hgetall(key) for key in client.keys(f"{KEY_PREFIX}run:*:documents")}


def test_a_place_outside_the_roots_ends_the_stream(fleet: Harness) -> None:
    fleet.worker()
    elsewhere = fleet.folder / "elsewhere"
    with submitting(fleet, str(elsewhere), fleet.source(texts(3))) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS" in err.splitlines()[-1]
    assert not elsewhere.exists()


def test_a_stream_by_value_is_gone_on_with_by_value_only(fleet: Harness) -> None:
    fleet.worker()
    source = fleet.source(texts(10))
    with submitting(fleet, str(fleet.out), source, follow=True) as process:
        acknowledgement(process)
        process.kill()
    code, out, err = told(fleet, "submit", "-", "--resume", run_below(fleet.out).uri)
    assert (code, out) == (2, "")
    assert "its documents come through the broker; go on with --by-value" in err
