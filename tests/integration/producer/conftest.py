"""A broker of our own for the module, and a stand-in worker that tags without a model."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyarrow as pa
import pytest

from nermill.producer import cli
from nermill.producer.local.broker import embedded_broker
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.layout import part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.records import Claim
from nermill.worker.contracts.schema import part_schema
from nermill.worker.contracts.shard import read_documents, read_shard
from nermill.worker.tagging import parts
from tests.stand_in import next_claim

ARTIFACT = "a" * 64
POISON = "POISON"

Serving = Callable[..., AbstractContextManager[Ledger]]


@pytest.fixture(scope="module")
def broker_url() -> Iterator[str]:
    with embedded_broker() as url:
        yield url


@pytest.fixture
def broker(broker_url: str) -> str:
    redis_client(broker_url).flushall()
    return broker_url


@pytest.fixture
def serving(broker: str) -> Serving:
    """A context in which shards are tagged: every capitalised word is a PER; a text with POISON fails."""

    @contextmanager
    def serve(artifact: str = ARTIFACT, pause: float = 0.0) -> Iterator[Ledger]:
        ledger = Ledger(redis_client(broker))
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                claim = next_claim(ledger, artifact)
                if claim is None:
                    time.sleep(0.02)
                    continue
                tag(claim, ledger)
                time.sleep(pause)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield ledger
        finally:
            stop.set()
            thread.join()

    return serve


@pytest.fixture
def nermill(monkeypatch, capfd):
    """Runs a command in this process; answers (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nermill", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def tag(claim: Claim, ledger: Ledger) -> None:
    """What a worker does with a claim."""
    run, shard = claim.folder, claim.shard
    if shard is None:
        ledger.close(claim.run_id, claim)
        return
    claimed = time.time()
    documents = read_documents(read_shard(run, shard.index, shard.sha256))
    rows = [{"doc_index": shard.first + at, **_row(document)} for at, document in enumerate(documents)]
    options = claim.options
    table = pa.Table.from_pylist(rows, part_schema(keep_text=options.keep_text, keep_fields=options.keep_fields))
    if not run.exists(part_name(shard.index)):
        tokens = sum(row["n_tokens"] for row in rows)
        stats = {
            "tokens": tokens, "computed_tokens": 2 * tokens, "windows": len(rows), "device": "cpu",
            "worker": "stand-in", "host": "here", "claimed": claimed, "finished": time.time(), "queue_seconds": 0.0,
            "tokenize_seconds": 0.0, "wait_seconds": 0.0, "compute_seconds": 0.1, "decode_seconds": 0.0,
            "attempts": claim.attempts,
        }  # fmt: skip
        metadata = {
            "run_id": claim.run_id,
            "model": "stand-in", "artifact_sha256": ARTIFACT, "aggregation": options.aggregation,
        }  # fmt: skip
        parts.commit(run, shard.index, table, metadata=metadata, stats=stats)
    committed = parts.read_committed(run, shard.index)
    ledger.complete(
        claim,
        "stand-in",
        ok=committed.ok,
        rejected=committed.rejected,
        tokens=committed.tokens,
        computed=committed.computed,
    )


def _row(document: Document) -> dict[str, Any]:
    text = document.text or " ".join(document.words or ())
    fault = document.fault
    if POISON in text:
        fault = Fault("model_failure", "poison")
    entities, tags, at = [], [], 0
    for word in document.words or text.split(" "):
        is_name = word[:1].isupper() and fault is None
        tags.append("B-PER" if is_name else "O")
        if is_name:
            entity = {"start": at, "end": at + len(word), "label": "PER", "text": word, "score": 0.9}
            entities.append(entity)
        at += len(word) + 1
    return {
        "doc_id": document.id, "n_chars": len(text), "n_tokens": len(tags), "n_windows": 1,
        "status": "rejected" if fault else "ok", "entities": entities, "words": document.words,
        "tags": tags if document.words else None, "gold_tags": document.gold_tags, "text": document.text,
        "fields": None, "reject_reason": fault and fault.reason, "reject_message": fault and fault.message,
    }  # fmt: skip
