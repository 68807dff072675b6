"""What ``nermill doctor`` finds when something does not fit together."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator

import pytest

from producer.doctor import Finding, examine
from worker.contracts.broker import redis_client
from worker.contracts.ledger import Ledger
from worker.contracts.message import KEY_PREFIX, QUEUE
from worker.contracts.plan import Options, Shard


class _OldServer(socketserver.StreamRequestHandler):
    """Answers like a Redis 5."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                self.rfile.readline()
                words.append(self.rfile.readline().strip().upper())
            info = b"# Server\r\nredis_version:5.0.7\r\n"
            answers = {
                b"PING": b"+PONG\r\n",
                b"INFO": b"$%d\r\n%s\r\n" % (len(info), info),
                b"HELLO": b"-ERR unknown\r\n",
            }
            self.wfile.write(answers.get(words[0], b"+OK\r\n"))


@pytest.fixture
def old_server() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _OldServer) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2"
        server.shutdown()
        thread.join()


@pytest.fixture
def listening(broker: str) -> Iterator[None]:
    """A connection that waits for bells, as a worker's does."""
    client = redis_client(broker)
    thread = threading.Thread(target=client.brpop, args=(KEY_PREFIX + QUEUE, 30), daemon=True)
    thread.start()
    while not any(entry["cmd"] == "brpop" for entry in redis_client(broker).client_list()):
        pass
    yield
    redis_client(broker).rpush(KEY_PREFIX + QUEUE, "done")
    thread.join()


def findings(broker: str, tmp_path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(broker, "demo", "cpu", str(tmp_path))}


def test_an_old_server_is_refused(old_server, tmp_path):
    broker = findings(old_server, tmp_path)["broker"]
    assert (broker.ok, broker.mend) == (False, "upgrade the server: Redis 6.2 or newer, or Valkey")


def test_a_server_that_evicts_is_named(broker, tmp_path):
    client = redis_client(broker)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = findings(broker, tmp_path)["broker"]
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert (found.ok, found.mend) == (False, "redis-cli config set maxmemory-policy noeviction")


def test_all_is_well_with_a_worker(broker, listening, tmp_path):
    pytest.importorskip("onnxruntime")
    found = findings(broker, tmp_path)
    assert {name for name, finding in found.items() if not finding.ok} == set()


def test_a_run_for_another_artifact_is_named(broker, listening, tmp_path):
    ledger = Ledger(redis_client(broker))
    ledger.open("r1", str(tmp_path), Options(), artifact="b" * 64)
    ledger.send("r1", [Shard(0, 0, 1, "c" * 64)])
    workers = findings(broker, tmp_path)["workers"]
    assert not workers.ok
    assert "bbbbbbbbbbbb" in workers.detail


def test_no_worker_is_named_with_the_command_that_starts_one(broker, tmp_path):
    workers = findings(broker, tmp_path)["workers"]
    assert (workers.ok, workers.mend) == (False, f"nermill-worker --model demo --broker {broker}")
