"""The queue's protocol in a simulated world, in short; at length in tests/acceptance. See tests/exploration."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.plan import Options, Shard
from nermill.worker.contracts.records import Claim, WorkerProcess
from tests.exploration.mutants import MUTANTS
from tests.exploration.server import Server
from tests.exploration.state import View

LEASE = 60.0
SHA = "0" * 64


def explore(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the world takes the place of modules."""
    command = [sys.executable, "-m", "tests.exploration", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
def test_no_single_fault_and_no_random_walk_breaks_an_invariant(root: Path) -> None:
    names = ("disk", "store", "cancel", "compact", "value", "stream", "stream-value")
    scenarios = [word for name in names for word in ("--scenario", name)]
    done = explore(root, *scenarios, "--slice", "1/8", "--walks", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    schedules = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) schedules", done.stdout)]
    assert len(schedules) == 8
    assert min(schedules) >= 50, done.stdout
    assert "not whole" not in done.stdout


@pytest.mark.timeout(600)
def test_worlds_that_seem_alike_go_on_alike(root: Path) -> None:
    done = explore(root, "--scenario", "disk", "--scenario", "store", "--agreement", "--walks", "25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(number.replace(",", "")) > 1000 for number in re.findall(r"([\d,]+) worlds", done.stdout)] == [True] * 2


@pytest.mark.timeout(600)
def test_a_seeded_fault_is_found_and_a_schedule_is_walked_again(root: Path) -> None:
    done = explore(root, "--mutant", "leases are not renewed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 found" in done.stdout
    again = explore(root, "--scenario", "disk", "--replay", "63:kill w0,90:fail")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "<-- kill w0" in again.stdout
    assert "no invariant is violated" in again.stdout


def test_each_seeded_fault_still_fits_the_code(root: Path) -> None:
    counts = {mutant.name: (root / mutant.file).read_text("utf-8").count(mutant.old) for mutant in MUTANTS}
    assert len(counts) == len(MUTANTS) >= 25
    assert {name for name, count in counts.items() if count != 1} == set()


def test_the_model_names_code_that_exists(root: Path) -> None:
    page = (root / "worker/queue/MODEL.md").read_text("utf-8").partition("## Invariants")[2]
    named = 0
    for file, names in re.findall(r"`([\w/]+\.(?:py|lua))`((?:,? `\w+`)+)", page):
        text = (root / file).read_text("utf-8")
        for name in re.findall(r"`(\w+)`", names):
            named += 1
            assert re.search(rf"(def |function |function step\.|\"){name}\b", text), f"{file} has no {name}"
    assert named > 40


class Twin:
    """A server of the exploration, as the ledger's client."""

    def __init__(self) -> None:
        view = View()
        view.now, view.ids, view.generations = 1_000_000.0, {}, {}
        self.server = Server(view)

    def register_script(self, source: str) -> Any:
        program = Server.script(source)
        return lambda keys, args: program(self.server, keys, args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)


@pytest.fixture
def client(embedded_broker_url: str) -> Iterator[Redis]:
    with redis_client(embedded_broker_url) as made:
        yield made


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("add", "promote", "recover", "lease", "renew", "release", "complete", "expire", "close", "drop")
        ),
        st.integers(0, 2),
        st.sampled_from((0.5, 5.0, 40.0)),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
@pytest.mark.slow
def test_the_simulated_server_answers_as_a_real_one(client: Redis, steps: list[tuple[str, int, float]]) -> None:
    prefix, twin = f"test-{uuid.uuid4().hex}:", Twin()
    ledgers = [Ledger(client, prefix), Ledger(twin, prefix)]
    queue, now = "nermill.aaaaaaaaaaaa", 1_000_000.0
    claims: list[list[Claim]] = [[], []]
    for ledger in ledgers:
        ledger.open("r", "/out", Options(), artifact="a" * 64)
    for name, number, seconds in steps:
        now += seconds
        answers = []
        for ledger, held in zip(ledgers, claims, strict=True):
            claim = held[number % len(held)] if held else None
            answer: Any = None
            if name == "add":
                answer = ledger.add("r", [Shard(at, at * 10, 10, SHA) for at in range(number, 3)])
            elif name == "promote":
                answer = ledger.promote(queue, now)
            elif name == "recover":
                answer = ledger.recover(queue, number, now)
            elif name == "lease":
                answer = ledger.lease("r", number, WorkerProcess("w", "cpu", "m", "a" * 64), LEASE, now)
                if isinstance(answer, Claim):
                    held.append(answer)
                    answer = (answer.shard, answer.attempts)
            elif name == "expire":
                answer = ledger.expire(now)
            elif name == "close":
                answer = ledger.close("r")
            elif name == "drop" and number == 0:
                ledger.drop("r")
            elif claim is not None and name == "renew":
                answer = ledger.renew(claim, LEASE, now)
            elif claim is not None and name == "release":
                answer = ledger.release(claim, "why")
            elif claim is not None and name == "complete":
                answer = ledger.complete(claim, "w", ok=number, rejected=1, tokens=2, computed=3, now=now)
            answers.append((name, answer, replace(ledger.progress("r"), started=0.0, finished=0.0)))
        assert answers[0] == answers[1]
