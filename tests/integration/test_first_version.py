"""Runs and workers of the first version at the same broker: said in one line, and left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from celery import Celery

from tests.harness import Harness, rows, texts


def test_doctor_and_worker_say_that_the_first_version_is_here(fleet: Harness) -> None:
    with fleet.server.client() as client:
        client.hset("nermill:run:abc", mapping={"uri": "/old", "state": "closed", "artifact": ""})
        client.zadd("nermill:runs", {"abc": 0})
        client.zadd("nermill:run:abc:pending", {"0": 0})
        client.zadd("nermill:workers", {"{}": 9e15})
        client.lpush("nermill:nermill", "{}")
        before = {key: client.type(key) for key in client.keys("nermill:*")}
    worker = fleet.worker()
    worker.await_ready()
    run, plan = fleet.submit(texts(64))
    fleet.wait(run, plan)
    assert len(rows(run)) == 64
    assert worker.log.read_text().count("nermill 1 is at this broker too (1 runs, 1 workers)") == 1
    with fleet.server.client() as client:
        assert {key: client.type(key) for key in before} == before
    _, doctor = fleet.ask("doctor")
    (found,) = [one for one in doctor["findings"] if one["name"] == "version"]
    assert not found["ok"]
    assert "1 runs, 1 workers" in found["detail"]
    assert "stop its workers" in found["fix"]


def first_version_app(fleet: Harness) -> Celery:
    """A Celery application as the first version made it: its keys have a prefix, its message names no shard."""
    app = Celery(broker=fleet.server.url, set_as_current=False)
    app.conf.update(task_default_queue="nermill", broker_transport_options={"global_keyprefix": "nermill:"})
    return app


def test_messages_of_the_first_version_stay_its_own(fleet: Harness) -> None:
    """Its producer's message is left to its worker, whose queue no message of this version reaches."""
    old = first_version_app(fleet)
    old.send_task("nermill.tag", kwargs={"version": 1})
    with fleet.server.client() as client:
        assert client.llen("nermill:nermill") == 1, "the message is where the first version looks"
        fleet.worker().await_ready()
        run, plan = fleet.submit(texts(200), documents_per_shard=10)
        fleet.wait(run, plan)
        assert client.llen("nermill:nermill") == 1
    assert len(rows(run)) == 200
    assert "refused" not in fleet.logs()
    with old.connection() as connection:
        queue = connection.SimpleQueue("nermill")
        message = queue.get(timeout=5)
        assert (message.headers["task"], message.payload[1]) == ("nermill.tag", {"version": 1})
        message.ack()
        with pytest.raises(queue.Empty):
            queue.get(timeout=1)


def test_a_message_of_the_first_version_in_our_queue_is_refused_by_name(fleet: Harness) -> None:
    worker = fleet.worker()
    worker.await_ready()
    fleet.app().send_task("nermill.tag", kwargs={"version": 1}, queue="nermill")
    fleet.until(lambda: "refused: a message of nermill 1, which this version does not serve" in worker.log.read_text())
    run, plan = fleet.submit(texts(20))
    fleet.wait(run, plan)
    assert worker.is_alive


def test_a_plan_of_the_first_version_is_refused_by_name(fleet: Harness) -> None:
    run = fleet.out / "run=old"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps({"plan_version": 1, "run_id": "old"}))
    for command in ("status", "resume", "cancel"):
        asked = subprocess.run(
            [sys.executable, "-m", "nermill.producer.cli", command, str(run), "--broker", fleet.server.url],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (asked.returncode, asked.stdout) == (2, "")
        assert "made by an earlier nermill (plan.json, plan version 1)" in asked.stderr
        assert len(asked.stderr.splitlines()) == 1
