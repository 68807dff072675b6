"""``nermill-worker`` as an operator meets it: dry run, wrong settings, a process that dies, foreign messages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from kombu import Connection, Exchange, Producer, Queue

from nermill.worker.contracts.broker import TRANSPORT_OPTIONS
from nermill.worker.contracts.manifest import resolve_artifact
from nermill.worker.contracts.message import QUEUE, TASK
from tests.harness import REAL, Harness, rows, texts

WORKER = [sys.executable, "-m", "nermill.worker.launch"]


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
def supervisor(mill: Harness, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*WORKER, "--broker", mill.server.url, "--devices", "cpu", "--allowed-roots", str(mill.out), *arguments]
    with (mill.folder / "supervisor.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as made:
        try:
            yield made
        finally:
            made.terminate()
            made.wait(40)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def test_a_process_that_dies_is_started_again_and_nothing_outlives_the_supervisor(mill: Harness) -> None:
    with supervisor(mill, "--lease-seconds", "2") as process:
        mill.until(lambda: children(process))
        (first,) = children(process)
        os.kill(first, signal.SIGKILL)
        mill.until(lambda: children(process) not in ([], [first]))
        run_folder, plan = mill.submit(texts(100))
        mill.wait(run_folder, plan)
        assert len(rows(run_folder)) == 100
        (second,) = children(process)
        process.terminate()
        assert process.wait(40) == 0
        assert not Path(f"/proc/{second}").exists()


def test_metrics_and_health_are_served(mill: Harness) -> None:
    with supervisor(mill, "--metrics-port", "19815"):
        run_folder, plan = mill.submit(texts(100))
        mill.wait(run_folder, plan)
        with urlopen("http://127.0.0.1:19815/metrics") as answer:
            scraped = answer.read().decode()
        with urlopen("http://127.0.0.1:19815/healthz") as answer:
            assert answer.read() == b"ok\n"
    assert 'nermill_documents_total{outcome="ok"} 100.0' in scraped
    assert 'nermill_tokens_total{kind="real"}' in scraped


def test_a_run_outside_the_allowed_roots_is_refused_and_untouched(mill: Harness) -> None:
    outside = mill.folder / "outside"
    outside.mkdir()
    (mill.out / "link").symlink_to(outside)
    _, plan = mill.submit(texts(10), out=str(mill.out / "link"))
    before = sorted(outside.rglob("*"))
    worker = mill.worker(REAL)
    with mill.queue().ledger() as ledger:
        mill.until(lambda: ledger.progress(plan.run_id).buried, 30)
    assert worker.is_alive
    assert "outside the allowed roots" in mill.logs()
    assert sorted(outside.rglob("*")) == before


def test_foreign_messages_are_dropped_and_the_worker_stays(mill: Harness) -> None:
    worker = mill.worker()
    with Connection(mill.server.url, transport_options=TRANSPORT_OPTIONS) as connection:
        queue = Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)
        producer = Producer(connection, exchange=queue.exchange, routing_key=QUEUE, auto_declare=False)
        headers = {"lang": "py", "task": TASK, "id": "1", "root_id": "1", "parent_id": None, "group": None}
        producer.publish((["x"], {}, {}), serializer="pickle", headers=headers)
        producer.publish("[[], {}", content_type="application/json", content_encoding="utf-8", headers=headers)
        producer.publish(([], {"version": 99}, {}), serializer="json", headers=headers)
        producer.publish(([], {"other": 1}, {}), serializer="json", headers=headers)
        producer.publish(([], {}, {}), serializer="json", headers={**headers, "task": "os.system"})
    run_folder, plan = mill.submit(texts(64))
    mill.wait(run_folder, plan)
    assert worker.is_alive
    assert len(rows(run_folder)) == 64


def test_another_pool_is_refused_with_the_one_that_serves(mill: Harness) -> None:
    celery = [sys.executable, "-m", "celery", "-A", "tests.doubles.app", "worker", "--pool", "solo"]
    environment = {**os.environ, "NERMILL_BROKER_URL": mill.server.url, "NERMILL_ALLOWED_ROOTS": str(mill.out)}
    with (mill.folder / "celery.log").open("w+") as log:
        process = subprocess.Popen(celery, env=environment, stdout=log, stderr=log)
        try:
            mill.until(lambda: "start Celery with --pool threads" in (mill.folder / "celery.log").read_text(), 30)
        finally:
            process.kill()
            process.wait(10)
