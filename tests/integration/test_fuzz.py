"""Messages, ledger entries and input files that are almost right: no crash, nothing read or written that is not ours.

The long form is in tests/acceptance.
"""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path
from urllib.request import urlopen

from tokenizers import Tokenizer

from nermill.worker.contracts.layout import part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.contracts.message import KEY_PREFIX, QUEUE
from nermill.worker.metrics import Metrics
from nermill.worker.mill import Mill
from nermill.worker.pipeline import Pipeline
from nermill.worker.settings import Settings
from tests import fuzz
from tests.doubles.engine import HashEngine, manifest
from tests.harness import Harness, rows, texts

SECRET = "the content of another's file"


def test_mutated_messages(mill: Harness) -> None:
    fuzz_messages(mill, seed=1, count=1500)


def test_mutated_messages_after_the_server_was_away(mill: Harness) -> None:
    run, plan = mill.submit(texts(64))
    mill.worker()
    mill.wait(run, plan)
    mill.server.kill()
    mill.server.start()
    with mill.server.client() as client:
        client.lpush(KEY_PREFIX + QUEUE, *fuzz.messages(random.Random(3), 200, mill.folder / "canary"))
        mill.until(lambda: not client.llen(KEY_PREFIX + QUEUE), 30)
    assert mill.workers[0].is_alive
    assert mill.workers[0].log.read_text().count("dropped: a message") > 100
    assert not (mill.folder / "canary").exists()


def test_mutated_ledger_entries(mill: Harness) -> None:
    fuzz_ledger(mill, seed=1, count=150)


def test_mutated_input_files(tmp_path: Path) -> None:
    read, refused = fuzz.fuzz_sources(tmp_path, seed=1, count=2000)
    assert read > 200
    assert refused > 200


def fuzz_messages(mill: Harness, seed: int, count: int) -> None:
    """Puts mutants into the queue of a real consumer: each is counted, none is followed, and the worker goes on."""
    canary = mill.folder / "canary"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = mill.worker(NERMILL_METRICS_PORT=str(port))
    before = fingerprint(mill.folder)
    mutants = list(fuzz.messages(random.Random(seed), count, canary))
    with mill.server.client() as client:
        for at in range(0, count, 500):
            client.lpush(KEY_PREFIX + QUEUE, *mutants[at : at + 500])
    deadline = time.monotonic() + 10 + count / 50
    while sum(counted := scrape(port)) < count:
        assert worker.is_alive, mill.logs()
        assert time.monotonic() < deadline, (counted, mill.logs())
        time.sleep(0.2)
    assert sum(counted) == count
    refused, _ = counted
    assert refused > count / 2
    assert not canary.exists(), "a message was unpickled"
    assert fingerprint(mill.folder) == before
    run, plan = mill.submit(texts(64))
    mill.wait(run, plan)
    assert worker.is_alive
    assert len(rows(run)) == 64


def scrape(port: int) -> tuple[int, int]:
    """Messages that a worker refused, and bells that it answered; zeros before it listens."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0, 0
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return int(float(values["nermill_refused_messages_total"])), int(float(values["nermill_bells_total"]))


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
    metrics = Metrics()
    changes = fuzz.ledger_changes(random.Random(seed), plan.run_id, outside / "run", mill.out)
    with mill.server.client() as client:
        pipeline = Pipeline(HashEngine(manifest()), tokenizer)
        made = Mill(pipeline, Ledger(client), settings, lambda bells: None, metrics)
        ledger = Ledger(client)
        for number in range(count):
            change = next(changes)
            client.flushall()
            for shard in run.committed():
                run.remove(part_name(shard))
            ledger.open(plan.run_id, run.uri, plan.options)
            ledger.send(plan.run_id, plan.shards)
            client.execute_command(*(word.encode("utf-8", "surrogateescape") for word in change))
            handled = outcomes(metrics)
            made.answer_bell()
            assert outcomes(metrics) > handled, (seed, number, change)
        pipeline.close()
    assert fingerprint(outside) == before
    assert not any(SECRET.encode() in path.read_bytes() for path in mill.out.rglob("*") if path.is_file())
    for name in run.list():
        assert not name.startswith("."), name


def outcomes(metrics: Metrics) -> float:
    """Entries that were refused, handed back or committed."""
    names = {"nermill_refused_messages_total", "nermill_handed_back_shards_total", "nermill_shard_seconds_count"}
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name in names)


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, but for logs and the server's own."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log" and "server" not in path.parts
    }
