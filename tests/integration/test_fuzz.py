"""Messages, ledger entries and input files that are almost right: no crash, nothing read or written that is not ours.

The long form is in tests/acceptance.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

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


def test_mutated_messages(mill: Harness) -> None:
    fuzz_messages(mill, seed=1, count=1500)


def test_mutated_ledger_entries(mill: Harness) -> None:
    fuzz_ledger(mill, seed=1, count=150)


def test_mutated_input_files(tmp_path: Path) -> None:
    read, refused = fuzz.fuzz_sources(tmp_path, seed=1, count=2000)
    assert read > 200
    assert refused > 200


def fuzz_messages(mill: Harness, seed: int, count: int) -> None:
    """Puts mutants into the queue and the control channel of a real worker: no process ends, none is followed."""
    canary = mill.folder / "canary"
    port = free_port()
    worker = mill.worker(NERMILL_METRICS_PORT=str(port), NERMILL_CONCURRENCY="4")
    worker.await_ready()
    before = fingerprint(mill.folder)
    rng = random.Random(seed)
    mutants = list(fuzz.messages(rng, count, canary))
    with mill.server.client() as client:
        for at in range(0, count, 250):
            client.lpush(QUEUE, *mutants[at : at + 250])
            for command in fuzz.commands(rng, 25, canary):
                client.publish("/0.celery.pidbox", command)
            deadline = time.monotonic() + 30
            while client.llen(QUEUE):
                assert worker.is_alive, mill.logs()
                assert time.monotonic() < deadline, (scrape(port), mill.logs())
                time.sleep(0.05)
        mill.until(lambda: sum(scrape(port)) >= count, 30)
        refused, received = scrape(port)
        assert refused > count / 2
        assert received > count / 50, "mutants that are still valid are served"
        told = worker.log.read_text()
        assert "Traceback" not in told
        assert told.count(" refused: ") == refused
        assert "Connection to broker lost" not in told
        assert not canary.exists(), "a message was unpickled, followed or executed"
        assert fingerprint(mill.folder) == before
        mill.until(lambda: not client.hlen("unacked"), 30)
    run, plan = mill.submit(texts(64))
    mill.wait(run, plan)
    assert worker.is_alive
    assert len(rows(run)) == 64
    assert mill.app().control.ping(timeout=5), "remote control works as before"


def scrape(port: int) -> tuple[int, int]:
    """Messages and entries that a worker refused, and messages of the three tasks that it received."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    received = sum(float(value) for name, value in values.items() if name.startswith("nermill_messages_total"))
    return int(float(values["nermill_refused_messages_total"])), int(received)


def fuzz_ledger(mill: Harness, seed: int, count: int) -> None:
    """Makes one entry of a run wrong, over and over: the worker says so, counts it, and keeps to its roots."""
    outside = mill.folder / "outside"
    run, plan = mill.plan(texts(20), documents_per_shard=10)
    elsewhere, _ = mill.plan([SECRET] * 20, documents_per_shard=10, out=str(outside))
    Path(elsewhere.uri).rename(outside / "run")
    (mill.out / "link").symlink_to(outside / "run")
    before = fingerprint(outside)
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    settings = Settings(allowed_roots=str(mill.out), lease_seconds=1)
    changes = fuzz.ledger_changes(random.Random(seed), plan.run_id, outside / "run", mill.out)
    states: Counter[str] = Counter()
    with mill.server.client() as client:
        pipeline = Pipeline(HashEngine(manifest()), tokenizer)
        ledger = Ledger(client)
        dispatcher = Dispatcher(celery_app(mill.server.url), ledger)
        worker = ShardWorker(pipeline, ledger, dispatcher, settings, Metrics())
        worker.stopping.set()  # no pauses
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
    assert not any(SECRET.encode() in path.read_bytes() for path in mill.out.rglob("*") if path.is_file())
    for name in run.list():
        assert not name.startswith("."), name


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, but for logs and the server's own."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log" and "server" not in path.parts
    }
