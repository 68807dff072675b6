"""Messages, ledger entries and input files that are almost right: no crash, nothing read or written that is not ours.

The long form is in tests/acceptance.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis.exceptions import RedisError
from tokenizers import Tokenizer

from nermill.worker.contracts.broker import celery_app
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.layout import part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.contracts.message import QUEUE
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.tagging.pipeline import Pipeline
from tests import fuzz
from tests.doubles.engine import HashEngine, manifest
from tests.harness import Harness, free_port, rows, texts

SECRET = "the content of another's file"


@pytest.mark.slow
def test_mutated_messages(fleet: Harness) -> None:
    fuzz_messages(fleet, seed=1, count=1500)


def test_mutated_ledger_entries(fleet: Harness) -> None:
    fuzz_ledger(fleet, seed=1, count=150)


def test_mutated_input_files(tmp_path: Path) -> None:
    read, refused = fuzz.fuzz_sources(tmp_path, seed=1, count=2000)
    assert read > 200
    assert refused > 200


def fuzz_messages(fleet: Harness, seed: int, count: int) -> None:
    """Puts mutants into the queue and the control channel of a real worker: no process ends, none is followed."""
    canary = fleet.folder / "canary"
    port = free_port()
    worker = fleet.worker(NERMILL_METRICS_PORT=str(port), NERMILL_CONCURRENCY="4")
    worker.await_ready()
    before = fingerprint(fleet.folder)
    rng = random.Random(seed)
    mutants = list(fuzz.messages(rng, count, canary))
    with fleet.server.client() as client:
        for at in range(0, count, 250):
            client.lpush(QUEUE, *mutants[at : at + 250])
            for command in fuzz.commands(rng, 25, canary):
                client.publish("/0.celery.pidbox", command)
            deadline = time.monotonic() + 30
            while client.llen(QUEUE):
                assert worker.is_alive, fleet.logs()
                assert time.monotonic() < deadline, (scrape(port), fleet.logs())
                time.sleep(0.05)
        fleet.until(lambda: sum(scrape(port)) >= count, 30)
        refused, received = scrape(port)
        assert refused > count / 2
        assert received > count / 50, "mutants that are still valid are served"
        told = worker.log.read_text()
        assert "Traceback" not in told
        assert told.count(" refused: ") == refused
        assert "Connection to broker lost" not in told
        assert not canary.exists(), "a message was unpickled, followed or executed"
        assert fingerprint(fleet.folder) == before
        fleet.until(lambda: not client.hlen("unacked"), 30)
    run, plan = fleet.submit(texts(64))
    fleet.wait(run, plan)
    assert worker.is_alive
    assert len(rows(run)) == 64
    fleet.until(lambda: fleet.app().control.ping(timeout=5), 60)  # remote control works as before


def scrape(port: int) -> tuple[int, int]:
    """Messages and entries that a worker refused, and messages of the three tasks that it received."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    received = sum(float(value) for name, value in values.items() if name.startswith("nermill_messages_total"))
    return int(float(values["nermill_refused_messages_total"])), int(received)


def fuzz_ledger(fleet: Harness, seed: int, count: int) -> None:
    """Makes one entry of a run wrong, over and over: the worker says so, counts it, and keeps to its roots."""
    outside = fleet.folder / "outside"
    run, plan = fleet.plan(texts(20), documents_per_shard=10)
    elsewhere, _ = fleet.plan([SECRET] * 20, documents_per_shard=10, out=str(outside))
    Path(elsewhere.uri).rename(outside / "run")
    (fleet.out / "link").symlink_to(outside / "run")
    before = fingerprint(outside)
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    settings = Settings(allowed_roots=str(fleet.out), lease_seconds=1)
    changes = fuzz.ledger_changes(random.Random(seed), plan.run_id, outside / "run", fleet.out)
    states: Counter[str] = Counter()
    with fleet.server.client() as client:
        pipeline = Pipeline(HashEngine(manifest()), tokenizer)
        ledger = Ledger(client)
        dispatcher = Dispatcher(celery_app(fleet.server.url), ledger)
        worker = ShardWorker(pipeline, ledger, dispatcher, settings, Metrics())
        worker.leases.stopping.set()  # no pauses
        for number in range(count):
            change = next(changes)
            client.flushall()
            for shard in run.committed():
                run.remove(part_name(shard))
            ledger.open(plan.run_id, run.uri, plan.options)
            ledger.add(plan.run_id, plan.shards)
            client.execute_command(*(word.encode("utf-8", "surrogateescape") for word in change))
            try:
                state = worker.tag_shard("id", plan.run_id, run.uri, 0)["state"]
            except MessageError:
                state = "refused"
            except RedisError:
                state = "error of the ledger"  # a hash field that is no number, say
            except Exception as error:
                raise AssertionError((seed, number, change)) from error
            states[state] += 1
        pipeline.close()
    assert states["refused"] > count / 5, states
    assert states["committed"] > count / 50, states
    assert fingerprint(outside) == before
    assert not any(SECRET.encode() in path.read_bytes() for path in fleet.out.rglob("*") if path.is_file())
    for name in run.list():
        assert not name.startswith("."), name


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, but for logs and the server's own."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log" and "server" not in path.parts
    }
