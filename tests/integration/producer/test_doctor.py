"""What ``nermill doctor`` finds when something does not fit together."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nermill.producer.doctor import Finding, examine
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.contracts.plan import Options, Shard
from tests.doubles import cann
from tests.harness import REAL, Server


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


def findings(broker: str, tmp_path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(broker, "demo", "cpu", str(tmp_path))}


def test_an_old_server_is_refused(old_server, tmp_path):
    broker = findings(old_server, tmp_path)["broker"]
    assert (broker.ok, broker.fix) == (False, "upgrade the server: Redis 6.2 or newer, or Valkey")


def test_a_server_that_evicts_is_named(broker, tmp_path):
    client = redis_client(broker)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = findings(broker, tmp_path)["broker"]
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert (found.ok, found.fix) == (False, "redis-cli config set maxmemory-policy noeviction")


def test_a_server_in_cluster_mode_is_refused(tmp_path):
    with tempfile.TemporaryDirectory(prefix="nm-") as folder:
        server = Server(Path(folder), ["--port", str(free_port()), "--cluster-enabled", "yes"])
        try:
            broker = findings(server.url, tmp_path)["broker"]
        finally:
            server.kill()
    assert not broker.ok
    assert "Redis Cluster cannot carry Celery's queues" in broker.detail
    assert "cluster-enabled no" in broker.fix


def free_port() -> int:
    """A port that is free, as is the cluster's own, 10,000 above it."""
    for port in range(20_000, 30_000):
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_workers_are_known_while_they_live_and_by_their_artifact(fleet, tmp_path):
    pytest.importorskip("onnxruntime")
    none = findings(fleet.server.url, tmp_path)["workers"]
    assert (none.ok, none.fix) == (False, f"nermill-worker --model demo --broker {fleet.server.url}")

    double = fleet.worker()
    double.await_ready()
    other = findings(fleet.server.url, tmp_path)["workers"]
    assert not other.ok
    assert re.search(r"none serves demo \(\w{12}\); 1 on cpu: double \(\w{12}\)", other.detail)
    assert other.fix.startswith("nermill-worker --model demo")

    real = fleet.worker(REAL)
    real.await_ready()
    assert {name for name, finding in findings(fleet.server.url, tmp_path).items() if not finding.ok} == set()
    with fleet.queue().ledger() as ledger:
        ledger.open("r1", str(tmp_path), Options(), artifact="b" * 64)
        ledger.add("r1", [Shard(0, 0, 1, "c" * 64)])
        waiting = findings(fleet.server.url, tmp_path)["workers"]
        assert not waiting.ok
        assert "bbbbbbbbbbbb" in waiting.detail
        ledger.drop("r1")
        (other,) = {w.artifact for w in ledger.workers()} - {load_manifest(resolve_artifact("demo")).sha256}
        double.signal(signal.SIGSTOP)  # it serves the run, but not now
        ledger.open("r2", str(fleet.out / "run=r2"), Options(), artifact=other)
        ledger.add("r2", [Shard(0, 0, 1, "c" * 64)])
        busy = findings(fleet.server.url, tmp_path)["workers"]
        assert busy.ok
        assert "; runs wait for double" in busy.detail
        ledger.drop("r2")
        double.signal(signal.SIGCONT)
    assert findings(fleet.server.url, tmp_path)["workers"].ok

    double.terminate()
    real.kill()
    assert [worker.model for worker in fleet.queue().workers()] == ["minilm-ner-en"]
    time.sleep(fleet.lease_seconds + 0.5)  # thrice the time between two signs of life
    assert fleet.queue().workers() == []


@pytest.mark.parametrize("devices", ["cuda:77", "npu:77", "cpu,npu:77"])
def test_a_device_that_is_not_visible_is_named(broker, tmp_path, devices):
    found = [f for f in examine(broker, "demo", devices, str(tmp_path)) if f.name == "device"]
    assert not found[-1].ok
    assert "77 is not visible (/dev/" in found[-1].detail
    assert re.match("npu-smi info|nvidia-smi", found[-1].fix)


def test_auto_looks_for_the_device_that_the_artifact_needs(broker, tmp_path):
    shutil.copytree(resolve_artifact("demo"), tmp_path / "aie")
    manifest = tmp_path / "aie" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "onnx"', '"backend": "aie"'))
    found = {f.name: f for f in examine(broker, str(tmp_path / "aie"), "auto", str(tmp_path))}
    assert "npu:0 is not visible" in found["device"].detail
    assert "mindietorch" in found["runtime"].fix


def test_the_two_wheels_and_the_compiler_of_offline_models(broker, tmp_path, monkeypatch):
    cann.forget(monkeypatch)
    shutil.copytree(resolve_artifact("demo"), tmp_path / "om")
    manifest = tmp_path / "om" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "onnx"', '"backend": "om"'))

    def found():
        return {f.name: f for f in examine(broker, str(tmp_path / "om"), "auto", str(tmp_path))}

    assert "the wheels ais_bench and aclruntime" in found()["runtime"].fix
    assert found()["atc"].detail == "not here; only building with om needs it"
    assert "npu:0 is not visible" in found()["device"].detail
    (tmp_path / "wheels" / "ais_bench").mkdir(parents=True)
    (tmp_path / "wheels" / "ais_bench" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "wheels"))
    assert "install the aclruntime wheel for Python 3" in found()["runtime"].fix
    (tmp_path / "wheels" / "aclruntime.py").touch()
    (tmp_path / "wheels" / "atc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "wheels"))
    assert found()["runtime"].ok
    assert found()["atc"].detail.endswith(
        "/wheels/atc builds for backend om once CANN's environment is loaded: source "
        "/usr/local/Ascend/ascend-toolkit/set_env.sh"
    )
    for place in ("bin", "compiler/bin"):
        toolkit = tmp_path / place.replace("/", "-")
        (toolkit / place).mkdir(parents=True)
        (toolkit / place / "atc").touch(mode=0o755)
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit))
        assert found()["atc"].detail == f"{toolkit}/{place}/atc builds for backend om"


def test_no_write_access_is_named_before_anything_is_made(broker, tmp_path):
    output = {f.name: f for f in examine(broker, "demo", "cpu", "/proc/tagged")}["output"]
    assert (output.ok, output.fix) == (False, "name a folder or URI that you may write with --out")
    assert {f.name: f for f in examine(broker, "demo", "cpu", str(tmp_path / "a" / "b"))}["output"].ok
    assert list(tmp_path.iterdir()) == []
