"""The users of ``deploy/users.acl``: each role can do its work, and not the others'."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from redis.exceptions import NoPermissionError

from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.layout import RunFolder
from tests.harness import ROOT, Harness, rows, texts


@pytest.fixture
def url_of(fleet: Harness) -> Callable[[str], str]:
    """The server's URL for a role."""
    lines = (ROOT / "deploy" / "users.acl").read_text().splitlines()
    with fleet.server.client() as client:
        for line in [line for line in lines if line.startswith("user ") and "default" not in line]:
            _, name, *rules = line.split()
            client.execute_command("ACL", "SETUSER", name, *rules)
    return lambda role: f"redis+socket://{role}:CHANGE-ME-{role.upper()}@{fleet.server.socket}"


@pytest.mark.slow
def test_each_role_can_do_its_work(fleet: Harness, url_of: Callable[[str], str]) -> None:
    worker = fleet.worker(NERMILL_BROKER_URL=url_of("worker"))
    worker.await_ready()
    with fleet.submitting(texts(200), url=url_of("producer")) as submitted:
        submitted.communicate(timeout=90)
        assert submitted.returncode == 0, fleet.logs()
    (run,) = fleet.out.glob("run=*")
    assert len(rows(RunFolder(str(run)))) == 200
    with fleet.submitting(texts(100), "--by-value", url=url_of("producer")) as submitted:
        submitted.communicate(timeout=90)
        assert submitted.returncode == 0, fleet.logs()
    (other,) = set(fleet.out.glob("run=*")) - {run}
    assert len(rows(RunFolder(str(other)))) == 100
    command = [sys.executable, "-m", "celery", "-b", url_of("watcher"), "inspect", "--timeout", "10", "registered"]
    asked = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
    assert "nermill.tag_shard" in asked.stdout, asked.stderr
    assert "NOPERM" not in fleet.logs() + asked.stderr


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("producer", ["BRPOP", "nermill", "1"]),
        ("producer", ["RPOP", "nermill"]),
        ("producer", ["LRANGE", "nermill", "0", "-1"]),
        ("producer", ["GET", "somebody:else"]),
        ("producer", ["HGETALL", "unacked"]),
        ("producer", ["PUBLISH", "/0.celery.pidbox", "{}"]),
        ("producer", ["FLUSHALL"]),
        ("worker", ["GET", "somebody:else"]),
        ("worker", ["CONFIG", "GET", "*"]),
        ("watcher", ["LPUSH", "nermill", "x"]),
        ("watcher", ["HSET", "nermill:2:run:r:documents", "0", "x"]),
        ("watcher", ["BRPOP", "nermill", "1"]),
        ("watcher", ["DEL", "nermill:2:queues"]),
        ("watcher", ["SET", "celery-task-meta-1", "x"]),
    ],
)
def test_no_role_can_do_more(fleet: Harness, url_of: Callable[[str], str], role: str, command: list[str]) -> None:
    with redis_client(url_of(role)) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command)
