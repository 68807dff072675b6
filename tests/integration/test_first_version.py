"""Runs and workers of the first version at the same broker: said in one line, and left alone."""

from __future__ import annotations

import json
import subprocess
import sys

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
    command = [sys.executable, "-m", "nermill.producer.cli", "doctor", "--broker", fleet.server.url, "--json"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (found,) = [one for one in json.loads(asked.stdout)["findings"] if one["name"] == "version"]
    assert not found["ok"]
    assert "1 runs, 1 workers" in found["detail"]
    assert "stop its workers" in found["mend"]
