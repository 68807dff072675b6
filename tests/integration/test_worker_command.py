"""``nermill-worker`` as an operator meets it: dry run, wrong settings, a process that dies, foreign messages."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from nermill.worker.contracts.manifest import resolve_artifact
from nermill.worker.contracts.message import QUEUE, TAG_DOCUMENTS, TAG_SHARD
from tests import fuzz
from tests.fuzz import message
from tests.harness import REAL, Harness, rows, texts

WORKER = [sys.executable, "-m", "nermill.worker.process.launch"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WORKER, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_dry_run_tags_one_example() -> None:
    done = run("--dry-run", "--devices", "cpu")
    assert done.returncode == 0, done.stderr
    assert "Ada Lovelace (PER" in done.stdout
    assert "London (LOC" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--devices", "gpu7"], {}, "'gpu7' is no device"),
        (["--devices", "npu:0,npu:0"], {}, "named twice"),
        (["--model", "/nowhere"], {}, "/nowhere: no model artifact"),
        (["--broker", "redis+cluster://h"], {}, "Redis Cluster cannot carry"),
        (["--broker", "amqp://h"], {}, "broker URLs begin with"),
        ([], {"NERMILL_LEASE_SECONDS": "soon"}, "NERMILL_LEASE_SECONDS='soon' is no number"),
        ([], {"NERMILL_CONCURRENCY": "0"}, "must be at least 1"),
        (["--devices", "cuda:0", "--dry-run"], {}, "cuda:0"),
    ],
)
def test_wrong_settings_get_one_line_and_exit_code_2(
    arguments: list[str], environment: dict[str, str], told: str
) -> None:
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def artifact() -> Iterator[Path]:
    """A copy of the demo artifact that a test may spoil."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "artifact"
        shutil.copytree(resolve_artifact("demo"), copy)
        yield copy


def test_a_changed_byte_is_refused(artifact: Path) -> None:
    model = artifact / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    done = run("--model", str(artifact), "--dry-run")
    assert done.returncode == 2
    assert "model.onnx: changed since it was built" in done.stderr


@contextmanager
def supervisor(fleet: Harness, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*WORKER, "--broker", fleet.server.url, "--devices", "cpu", "--allowed-roots", str(fleet.out), *arguments]
    with (fleet.folder / "supervisor.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as made:
        try:
            yield made
        finally:
            made.terminate()
            made.wait(40)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def test_a_process_that_dies_is_started_again_and_nothing_outlives_the_supervisor(fleet: Harness) -> None:
    with supervisor(fleet, "--lease-seconds", "2") as process:
        fleet.until(lambda: children(process))
        (first,) = children(process)
        os.kill(first, signal.SIGKILL)
        fleet.until(lambda: children(process) not in ([], [first]))
        run_folder, plan = fleet.submit(texts(100))
        fleet.wait(run_folder, plan)
        assert len(rows(run_folder)) == 100
        (second,) = children(process)
        process.terminate()
        assert process.wait(40) == 0
        assert not Path(f"/proc/{second}").exists()


def test_metrics_and_health_are_served(fleet: Harness) -> None:
    with supervisor(fleet, "--metrics-port", "19815"):
        run_folder, plan = fleet.submit(texts(100))
        fleet.wait(run_folder, plan)
        with urlopen("http://127.0.0.1:19815/metrics") as answer:
            scraped = answer.read().decode()
        with urlopen("http://127.0.0.1:19815/healthz") as answer:
            assert answer.read() == b"ok\n"
    assert 'nermill_documents_total{outcome="ok"} 100.0' in scraped
    assert 'nermill_tokens_total{kind="real"}' in scraped


def test_a_run_outside_the_allowed_roots_is_refused_and_untouched(fleet: Harness) -> None:
    outside = fleet.folder / "outside"
    outside.mkdir()
    (fleet.out / "link").symlink_to(outside)
    _, plan = fleet.submit(texts(10), out=str(fleet.out / "link"))
    before = sorted(outside.rglob("*"))
    worker = fleet.worker(REAL)
    with fleet.queue().ledger() as ledger:
        fleet.until(lambda: ledger.progress(plan.run_id).last_error, 30)
    assert worker.is_alive
    assert "outside the allowed roots" in fleet.logs()
    assert sorted(outside.rglob("*")) == before


def messages_that_are_refused(folder: Path) -> dict[str, bytes]:
    """Each kind of foreign message, by the words of its refusal."""
    documents = message(TAG_DOCUMENTS, ["Ada met Charles."])
    follow: dict[str, Any] = {"task": TAG_DOCUMENTS, "args": [["x"]], "kwargs": {}, "options": {}, "subtask_type": None}

    def headers(**more: Any) -> dict[str, Any]:
        return {**documents, "headers": {**documents["headers"], **more}}

    bomb = headers(compression="application/x-gzip")
    pickled = b64encode(pickle.dumps(([[fuzz.Touch(folder / "canary")]], {}, {}))).decode()
    made: dict[str, Any] = {
        "JSONDecodeError": b"no JSON",
        "TypeError": [1, 2],
        "KeyError: 'properties'": {},
        "no task message": {**documents, "headers": {}},
        "'os.system', which is not one of nermill's": headers(task="os.system"),
        "with an ETA or countdown": headers(eta="2099-01-01T00:00:00"),
        "a shadow name that is no text": headers(shadow=["x"]),
        "with a time limit": headers(timelimit=[5, None]),
        "a message with callbacks": message(TAG_DOCUMENTS, body=[[["x"]], {}, {"callbacks": [follow]}]),
        "a message with chain": message(TAG_DOCUMENTS, body=[[["x"]], {}, {"chain": [follow]}]),
        "a message with chord": headers(chord=follow),
        "is not [args, kwargs, embed] in JSON": {**documents, "content-type": "application/x-python-serialize",
                                                 "content-encoding": "binary", "body": pickled},
        "compressed or damaged": {**bomb, "body": b64encode(gzip_bomb()).decode()},
        "wrong arguments": message(TAG_SHARD, "r1"),
        "run id 5": message(TAG_SHARD, 5, "/x", 0),
        "folder None": message(TAG_SHARD, "r1", None, 0),
        "shard 'x'": message(TAG_SHARD, "r1", "/x", "x"),
        "documents: a list of texts": message(TAG_DOCUMENTS, "text"),
        "document 0: a text": message(TAG_DOCUMENTS, [5]),
        "options: an object": message(TAG_DOCUMENTS, ["x"], 5),
        "1001 documents": message(TAG_DOCUMENTS, ["x"] * 1001),
        "task id": headers(id=["x"]),
        "a message whose task id is not a text": headers(id=""),
        "bytes; 65536 are the most": message(TAG_SHARD, "r1", "x" * 70_000, 0),
    }  # fmt: skip
    return {told: one if isinstance(one, bytes) else json.dumps(one).encode() for told, one in made.items()}


def gzip_bomb() -> bytes:
    """2 MB that unpack to 2 GB."""
    packer = zlib.compressobj(9)
    block = bytes(10_000_000)
    return b"".join([*(packer.compress(block) for _ in range(200)), packer.flush()])


@pytest.mark.slow
def test_foreign_messages_are_refused_in_one_line_and_the_worker_stays(fleet: Harness) -> None:
    worker = fleet.worker()
    worker.await_ready()
    process = psutil.Process(worker.process.pid)
    memory = process.memory_info().rss
    foreign = messages_that_are_refused(fleet.folder)
    with fleet.server.client() as client:
        client.lpush(QUEUE, *foreign.values())
        for control in (b"[]", b"{}", b"no JSON", b"\xff", b'{"properties": 1}', json.dumps(message(body=[])).encode()):
            client.publish("/0.celery.pidbox", control)
        fleet.until(lambda: worker.log.read_text().count(" refused: ") >= len(foreign) + 3, 30)
    told = worker.log.read_text()
    assert [words for words in foreign if words not in told] == []
    assert "Traceback" not in told
    assert not (fleet.folder / "canary").exists()
    assert process.memory_info().rss - memory < 100_000_000
    run_folder, plan = fleet.submit(texts(64))
    fleet.wait(run_folder, plan)
    assert worker.is_alive
    assert len(rows(run_folder)) == 64


def test_a_refused_request_is_answered(fleet: Harness) -> None:
    fleet.worker()
    with pytest.raises(Exception, match="ETA or countdown"):
        fleet.app().send_task(TAG_DOCUMENTS, args=[["x"]], queue=QUEUE, countdown=60).get(timeout=60)
    with pytest.raises(Exception, match="wrong arguments"):
        fleet.app().send_task(TAG_DOCUMENTS, queue=QUEUE).get(timeout=60)


def test_celerys_shutdown_drains_and_the_device_stays_down(fleet: Harness) -> None:
    with supervisor(fleet) as process:
        run_folder, plan = fleet.submit(texts(100))
        fleet.wait(run_folder, plan)
        (first,) = children(process)
        os.kill(first, signal.SIGKILL)
        fleet.until(lambda: children(process) not in ([], [first]))
        fleet.until(lambda: fleet.app().control.ping(timeout=1), 60)
        fleet.app().control.shutdown()
        assert process.wait(60) == 0, "all devices are down"
    told = (fleet.folder / "supervisor.log").read_text()
    assert told.count("starting it again") == 1, "a crash is started again, a shutdown is not"
    assert "told to shut down; it is not started again" in told


def test_another_pool_is_refused_in_one_line(fleet: Harness) -> None:
    command = [sys.executable, "-m", "celery", "-A", "nermill.worker.app", "worker", "--pool", "solo"]
    environment = {**os.environ, "NERMILL_BROKER_URL": fleet.server.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "start Celery with --pool threads" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
