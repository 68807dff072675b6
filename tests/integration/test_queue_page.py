"""The queue's page: its commands are run, its tables name what the code has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest

from nermill.worker.contracts.records import TRANSITIONS
from nermill.worker.queue import finish, shards
from tests.harness import Harness
from tests.reference import steps

NO_ANSWER = 69  # celery's exit code where no worker answers
PAGE = Path(shards.__file__).with_name("README.md")


def flower_tasks() -> dict[str, dict[str, str]]:
    """Tasks that Flower saw, by id; none while it starts."""
    try:
        with urlopen("http://localhost:5555/api/tasks", timeout=10) as answer:
            return dict(json.load(answer))
    except OSError:
        return {}


def has_succeeded(task_id: str) -> bool:
    return flower_tasks().get(task_id, {}).get("state") == "SUCCESS"


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_everything_that_the_page_shows_runs(fleet: Harness) -> None:
    pytest.importorskip("flower")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NERMILL_BROKER_URL": fleet.server.url,
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    worker = fleet.worker()
    worker.await_ready()
    commands = [step.command for step in steps(PAGE.read_text("utf-8"))]
    assert len(commands) >= 9
    told: dict[str, str] = {}
    background: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            if command.endswith("&"):
                line = f"exec {command.removesuffix('&')}"
                background.append(subprocess.Popen(line, shell=True, cwd=fleet.folder, env=environment))
                fleet.until(lambda: worker_is_seen(), 60)
                asked = fleet.app().send_task("nermill.tag_documents", [["Ada met Charles."]], queue="nermill")
                asked.get(timeout=60)
                fleet.until(partial(has_succeeded, asked.id), 60)
                assert flower_tasks()[asked.id]["name"] == "nermill.tag_documents"
                continue
            done = subprocess.run(
                command, shell=True, cwd=fleet.folder, env=environment, capture_output=True, text=True, timeout=120
            )
            expected = NO_ANSWER if command.endswith(" control shutdown") else 0
            assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}\n{fleet.logs()}"
            told[command.rpartition("URL ")[2]] = done.stdout
        assert worker.process.wait(60) == 0, "the last command is control shutdown"
    finally:
        for process in background:
            process.kill()
            process.wait()
    assert "1 node online" in told["status"]
    assert "pong" in told["inspect ping"]
    assert set(re.findall(r"\* (\S+)", told["inspect registered"])) == {
        "nermill.tag_shard",
        "nermill.finish_run",
        "nermill.tag_documents",
    }
    assert re.findall(r"'name': '(nermill[^']*)', 'exchange'", told["inspect active_queues"])[0] == "nermill"
    assert '"total"' in told["inspect stats"]


def worker_is_seen() -> bool:
    """Whether Flower is up and has a worker."""
    try:
        with urlopen("http://localhost:5555/api/workers", timeout=10) as answer:
            return bool(json.load(answer))
    except OSError:
        return False


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table after a line of the page, as cells."""
    lines = iter(PAGE.read_text("utf-8").partition(f"{heading}\n")[2].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def test_every_state_of_a_result_is_in_the_table() -> None:
    source = "".join(Path(str(module.__file__)).read_text("utf-8") for module in (shards, finish))
    made = set(re.findall(r'(?:outcome\(\s*|"state": )"([a-z ]+)"', source)) | set(shards._REASONS)
    assert "committed" in made
    heading = "States in the result of `nermill.tag_shard` and `nermill.finish_run`:"
    assert {state.strip("`") for state, *_ in table_after(heading)} == made


def test_every_transition_of_a_run_is_in_the_table() -> None:
    written = {
        (start, end)
        for row in table_after("## A run")
        for start in re.findall(r"`(\w+)`", row[0])
        for end in re.findall(r"`(\w+)`", row[1])
        if start != end
    }
    assert written == {(start.value, end.value) for start, ends in TRANSITIONS.items() for end in ends}


def test_the_page_links_to_files_that_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text("utf-8")):
        assert (PAGE.parent / target).exists(), target
