"""Celery's own commands, as subprocesses that know the broker's URL alone, while a run is under way."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Plan
from tests.harness import Harness, rows, texts

pytestmark = pytest.mark.timeout(300)
TASKS = {"nermill.tag_shard", "nermill.finish_run", "nermill.tag_documents"}


def celery(fleet: Harness, *arguments: str) -> Any:
    """What a command answers, for the one worker."""
    command = [sys.executable, "-m", "celery", "-b", fleet.server.url, *arguments]
    done = subprocess.run(command, cwd=fleet.folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + fleet.logs()
    answer = json.loads(done.stdout)
    ((_, told),) = (answer[0] if isinstance(answer, list) else answer).items()
    return told


@pytest.fixture
def under_way(fleet: Harness) -> tuple[RunFolder, Plan]:
    """A run that takes half a minute, once its first shards are at work."""
    fleet.worker(FAULT_BATCH_SECONDS="0.7").await_ready()
    run, plan = fleet.submit(texts(1500), documents_per_shard=50)
    fleet.until(lambda: run.committed())
    return run, plan


@pytest.mark.slow
def test_inspect_tells_what_is_at_work_during_a_run(fleet: Harness, under_way: tuple[RunFolder, Plan]) -> None:
    run, plan = under_way
    assert celery(fleet, "inspect", "--json", "--timeout", "10", "ping") == {"ok": "pong"}
    active = celery(fleet, "inspect", "--json", "--timeout", "10", "active")
    assert active
    for task in active:
        assert task["name"] == "nermill.tag_shard"
        run_id, folder, shard = task["args"]
        assert (run_id, folder) == (plan.run_id, run.uri)
        assert 0 <= shard < len(plan.shards)
        assert task["delivery_info"]["routing_key"].startswith("nermill")
    assert set(celery(fleet, "inspect", "--json", "--timeout", "10", "registered")) == TASKS
    stats = celery(fleet, "inspect", "--json", "--timeout", "10", "stats")
    assert stats["pid"] == fleet.workers[0].process.pid
    assert stats["total"]["nermill.tag_shard"] >= len(active)
    report = celery(fleet, "inspect", "--json", "--timeout", "10", "report")["ok"]
    assert "worker_pool: 'threads'" in report
    fleet.wait(run, plan)
    assert len(rows(run)) == 1500


def waiting_messages(fleet: Harness) -> Iterator[dict[str, Any]]:
    """Messages that no worker has received, with ``id`` and ``args``."""
    with fleet.server.client() as client:
        for name in fleet.message_lists(client):
            for entry in client.lrange(name, 0, -1):
                message = json.loads(entry)
                yield {"id": message["headers"]["id"], "args": json.loads(b64decode(message["body"]))[0]}


@pytest.mark.slow
def test_a_revoked_shard_that_waits_is_sent_again_under_a_fresh_id(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(1000), documents_per_shard=50)
    fleet.worker(FAULT_BATCH_SECONDS="0.5", NERMILL_CONCURRENCY="1").await_ready()
    app = fleet.app()
    fleet.until(lambda: len(run.committed()) >= 1)

    def revoke_one() -> dict[str, Any] | None:
        for message in waiting_messages(fleet):
            if message["args"][0] == plan.run_id and len(message["args"]) == 3:
                app.control.revoke(message["id"], reply=True, timeout=2)
                if any(still["id"] == message["id"] for still in waiting_messages(fleet)):
                    return message
        return None

    revoked: list[dict[str, Any]] = []

    def is_revoked() -> bool:
        revoked.extend(filter(None, [revoke_one()]))
        return bool(revoked)

    fleet.until(is_revoked)
    (message,) = revoked
    again: set[str] = set()

    def is_sent_again() -> bool:
        again.update(m["id"] for m in waiting_messages(fleet) if m["args"] == message["args"])
        return len(again - {message["id"]}) > 0

    fleet.until(is_sent_again)
    fleet.wait(run, plan)
    assert f"Discarding revoked task: nermill.tag_shard[{message['id']}]" in fleet.logs()
    assert str(app.AsyncResult(message["id"]).state) == "REVOKED"
    assert sorted(row["doc_index"] for row in rows(run)) == list(range(1000))


@pytest.mark.slow
def test_a_task_that_runs_is_not_terminated_and_the_answer_says_why(
    fleet: Harness, under_way: tuple[RunFolder, Plan]
) -> None:
    run, plan = under_way
    app = fleet.app()
    ((_, active),) = (app.control.inspect(timeout=10).active() or {}).items()
    task_id = active[0]["id"]
    expected = "a running task is a thread and cannot be ended; nermill cancel RUN stops what has not begun"
    ((answer,),) = [one.values() for one in app.control.revoke(task_id, terminate=True, reply=True, timeout=10) or ()]
    assert answer["error"].startswith(expected)
    assert celery(fleet, "control", "--json", "--timeout", "10", "terminate", "KILL", task_id)["error"].startswith(
        expected
    )
    fleet.wait(run, plan)
    assert app.AsyncResult(task_id).state == "SUCCESS"
    assert "pidbox command error" not in fleet.logs()
    assert len(rows(run)) == 1500
