"""A stream goes on where it stopped, in the same run: each line of its input is once in the table."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nermill.producer.runs import run as runs
from nermill.producer.runs.compact import compact
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream import Stream
from nermill.producer.sources.live import LiveLines
from nermill.worker.contracts.content import MAX_LINE_BYTES
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import read_plan
from tests.harness import Harness, rows, texts

KILLS = 5
LINES = 20_000


def command(url: str, *arguments: object) -> list[str]:
    words = [sys.executable, "-m", "nermill.producer.cli", "submit", *map(str, arguments)]
    return [*words, "--broker", url, "--ack", "--linger", "0.2"]


def write_lines(file: Path, count: int) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for n, text in enumerate(texts(count)):
            lines.write(json.dumps({"id": f"d{n}", "text": text}) + ("\n\n" if n % 50 == 7 else "\n"))


def the_run(out: Path) -> RunFolder:
    [folder] = out.glob("run=*")
    return RunFolder(str(folder))


def kill_after(process: subprocess.Popen[str], shards: int, pause: float) -> list[dict[str, Any]]:
    """Reads so many acknowledgements, and kills the process a moment later; answers all it ever printed."""
    assert process.stdout is not None
    told = [json.loads(process.stdout.readline()) for _ in range(shards)]
    time.sleep(pause)
    process.kill()
    return told + [json.loads(line) for line in process.stdout if line.endswith("\n")]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["follow", "stdin"])
@pytest.mark.slow
def test_each_line_is_once_in_the_table_whatever_kills_the_producer(fleet: Harness, how: str) -> None:
    fleet.worker()
    source, chance = fleet.folder / "log.jsonl", random.Random(19)
    write_lines(source, LINES)
    options = ("--out", fleet.out, "--shard-documents", 100)
    acknowledged: list[dict[str, Any]] = []
    for kill in range(KILLS + 1):
        goes_on = ("--resume", the_run(fleet.out).uri) if kill and how == "stdin" else ()
        given = (source, "--follow") if how == "follow" else ("-", *goes_on)
        with (
            source.open("rb") as lines,
            subprocess.Popen(
                command(fleet.server.url, *given, *options), stdin=lines, stdout=subprocess.PIPE, text=True
            ) as process,
        ):
            assert process.stdout is not None
            if kill < KILLS:
                told = kill_after(process, chance.randint(15, 40), chance.random() / 20)
                assert process.wait() == -signal.SIGKILL
            else:
                told = []
                while not told or told[-1]["first"] + told[-1]["documents"] < LINES:
                    told.append(json.loads(process.stdout.readline()))
                if how == "follow":
                    process.send_signal(signal.SIGINT)
                assert process.stdout.read().startswith("run ")
                assert process.wait() == 0
        if acknowledged:
            assert told[0]["first"] >= acknowledged[-1]["first"]  # where it goes on
        acknowledged += told
    run = the_run(fleet.out)
    plan = read_plan(run)
    assert {ack["run_id"] for ack in acknowledged} == {plan.run_id}
    content = source.read_bytes()
    for ack in acknowledged:
        before = content[: ack["byte"]].splitlines()
        assert len(before) == ack["line"]
        assert json.loads(before[-1])["id"] == f"d{ack['first'] + ack['documents'] - 1}"
    fleet.wait(run, plan, timeout=200)
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(LINES)]
    assert [row["doc_index"] for row in rows(run)] == list(range(LINES))
    assert run.exists("_SUCCESS")


def follow(url: str, out: Path, source: Path, lines: int) -> tuple[subprocess.Popen[str], str]:
    """Follows a file until so many lines are acknowledged."""
    process = subprocess.Popen(
        command(url, source, "--follow", "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    told = ""
    while not told or json.loads(told)["line"] < lines:
        told = process.stdout.readline()
        assert told, process.stderr.read()
    return process, told


@pytest.mark.slow
def test_a_stream_that_was_ended_and_completed_goes_on_too(broker, serving, tmp_path):
    source = tmp_path / "log.jsonl"
    write_lines(source, 3)
    for lines in (3, 5):
        process, _ = follow(broker, tmp_path / "out", source, lines)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        run = the_run(tmp_path / "out")
        with serving():
            assert runs.wait(run, read_plan(run), Queue(broker)).ok == lines
        assert run.exists("_SUCCESS")
        with source.open("a") as more:
            more.write('{"id": "d3", "text": "Ada"}\n{"id": "d4", "text": "Ada"}\n')
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(5)]


def test_a_compacted_stream_goes_on(broker, serving, tmp_path):
    source = tmp_path / "log.jsonl"
    write_lines(source, 6)
    fed = command(broker, "-", "--out", tmp_path / "out", "--shard-documents", 2)
    with source.open() as lines:
        assert subprocess.run(fed, stdin=lines, capture_output=True, check=False).returncode == 0
    run = the_run(tmp_path / "out")
    with serving():
        runs.wait(run, read_plan(run), Queue(broker))
        assert len(compact(run, read_plan(run)).shards) == 1
        with source.open("a") as more:
            more.write('{"id": "d6", "text": "Ada"}\n')
        with source.open() as lines:
            words = command(broker, "-", "--resume", run.uri, "--wait")
            done = subprocess.run(words, stdin=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(7)]


@pytest.mark.parametrize("harm", ["truncated", "rotated", "removed"])
def test_a_file_that_is_rotated_while_it_is_followed_is_an_error(broker, tmp_path, harm):
    source = tmp_path / "log.jsonl"
    write_lines(source, 4)
    process, _ = follow(broker, tmp_path / "out", source, 4)
    if harm == "truncated":
        os.truncate(source, 10)
    else:
        os.rename(source, tmp_path / "log.jsonl.1")
        with (tmp_path / "log.jsonl.1").open("a") as late:
            late.write('{"id": "late", "text": "Ada"}\n')
        if harm == "rotated":
            write_lines(source, 1)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    happened = "truncated to 10" if harm == "truncated" else "moved, removed"
    assert err.splitlines()[-1].startswith(f"nermill: {source}: was {happened}")
    if harm != "truncated":  # what was written before the rotation is durable
        assert json.loads(out.splitlines()[-1])["line"] == 5


@pytest.mark.parametrize("harm", ["shorter", pytest.param("edited", marks=pytest.mark.slow)])
def test_another_file_in_the_place_of_a_followed_one_is_an_error(broker, tmp_path, harm):
    source = tmp_path / "log.jsonl"
    write_lines(source, 4)
    process, _ = follow(broker, tmp_path / "out", source, 4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    content = source.read_text()
    source.write_text(content[:20] if harm == "shorter" else content.replace("Ada", "Bob") + "{}\n")
    run = the_run(tmp_path / "out")
    before = {name: Path(run.path(name)).stat().st_mtime_ns for name in run.list()}
    done = subprocess.run(
        command(broker, source, "--follow", "--out", tmp_path / "out"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"{source}: {'ends at byte 20' if harm == 'shorter' else 'its first'}" in done.stderr
    assert before == {name: Path(run.path(name)).stat().st_mtime_ns for name in run.list()}


def test_two_producers_do_not_fill_one_stream(broker, tmp_path):
    source = tmp_path / "log.jsonl"
    write_lines(source, 4)
    process, _ = follow(broker, tmp_path / "out", source, 4)
    words = command(broker, source, "--follow", "--out", tmp_path / "out")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    process.kill()
    process.communicate()
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "another producer fills this stream" in done.stderr


def test_a_producer_that_was_thought_dead_writes_nothing_over_its_heir(broker, tmp_path):
    queue = Queue(broker)
    sleeper = Stream(str(tmp_path), queue, linger=60, limits=ShardLimits(documents=1))
    sleeper.flush()
    run_id = sleeper.plan.run_id
    heir = RunFolder(sleeper.run.uri)
    heir.write(heir.shard_file(0), b"the heir's")
    sleeper.add(Document("a", text="Ada"))
    with pytest.raises(StoreError, match="another producer goes on"):
        sleeper.flush()
    assert heir.read(heir.shard_file(0)) == b"the heir's"
    queue.leave_stream(run_id)


WRONG = {
    "no such run": (("-", "--resume", "{out}/run=none"), "no run here"),
    "a run of files": (("-", "--resume", "{files}"), "not a stream; nermill resume"),
    "files": (("{source}", "--resume", "{stream}"), "--resume goes on with a stream"),
    "another place": (("-", "--resume", "{stream}", "--out", "{out}/elsewhere"), "not below --out"),
    "other options": (("-", "--resume", "{stream}", "--overlap", "32"), "was begun with overlap 64, not 32"),
    "another model": (("-", "--resume", "{stream}", "--model", "demo"), "give the same --model"),
    "another input": (("-", "--resume", "{stream}"), "-: its first"),
    "a shorter input": (("-", "--resume", "{stream}"), "-: ends at byte 3"),
    "no position": (("-", "--resume", "{python}"), "does not say how far"),
    "no out": (("-",), "Missing option '--out'"),
    "follow: not a file": (("{folder}", "--follow", "--out", "{out}"), "not a regular file"),
    "follow: compressed": (("{source}.gz", "--follow", "--out", "{out}"), "not compressed"),
    "follow: not JSON lines": (("{source}", "--follow", "--format", "csv", "--out", "{out}"), "reads JSON lines"),
}


@pytest.fixture(scope="module")
def places(broker_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    source, out = folder / "log.jsonl", folder / "out"
    write_lines(source, 4)

    def submit(*arguments: object) -> str:
        known = set(out.glob("run=*"))
        with source.open() as lines:
            subprocess.run(command(broker_url, *arguments, "--out", out), stdin=lines, capture_output=True, check=True)
        [new] = set(out.glob("run=*")) - known
        return str(new)

    python = Stream(str(out), Queue(broker_url))
    python.add(Document("", text="Ada"))
    python.close()
    named = {"stream": submit("-"), "files": submit(source), "python": python.run.uri}
    return {"out": out, "source": source, "folder": folder, **named}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_one_line_and_nothing_is_written(broker_url, places, case):
    arguments, message = WRONG[case]
    given = [str(argument).format(**places) for argument in arguments]
    before = sorted((str(path), path.stat().st_mtime_ns) for path in places["out"].rglob("*") if path.is_file())
    fed = {"another input": "x" * 1000, "a shorter input": "xxx"}.get(case, "")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NERMILL_")}
    done = subprocess.run(
        command(broker_url, *given), input=fed, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    after = sorted((str(path), path.stat().st_mtime_ns) for path in places["out"].rglob("*") if path.is_file())
    assert after == before


def test_places_are_counted_in_bytes_and_lines(tmp_path):
    """Of blank lines, long lines, carriage returns and a last line without an end."""
    file = tmp_path / "lines"
    content = b"a\r\n\n" + b"x" * (MAX_LINE_BYTES + 3 * (1 << 20)) + b"\nlast"
    file.write_bytes(content)
    places = []
    with file.open("rb") as stream:
        for position, line in LiveLines(stream.fileno(), "f", follow=False).read(threading.Event()):
            places.append((position.byte, position.line, line))
    assert places == [(3, 1, b"a"), (4, 2, b""), (len(content) - 4, 3, None), (len(content), 4, b"last")]
    with file.open("ab") as more:
        more.write(b"\nnext\n")
    with file.open("rb") as stream:
        lines = LiveLines(stream.fileno(), "f", follow=False)
        lines.skip(position, "RUN")
        rest = [(place.byte, place.line, line) for place, line in lines.read(threading.Event())]
    assert rest == [(len(content) + 6, 5, b"next")]
    with file.open("r+b") as stream:
        stream.seek(len(content))
        stream.write(b"-on")
        stream.seek(0)
        lines = LiveLines(stream.fileno(), "f", follow=False)
        lines.skip(position, "RUN")
        with pytest.raises(UsageError, match="f:4: goes on"):
            list(lines.read(threading.Event()))
