"""A worker that is told to stop in the middle of a run: gone in time, and no shard is tried twice for it."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from nermill.producer.runs.status import part_stats
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.queue.leases import RELEASE_SECONDS
from tests.chaos import undisturbed
from tests.harness import Harness, rows, texts

DOCUMENTS = texts(960)
DELAY = 5.0  # of a machine that does much else


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return undisturbed(len(DOCUMENTS))


def attempts(run: RunFolder) -> set[int]:
    """How often the run's shards were tried, as their parts say."""
    return {entry["attempts"] for shard in run.committed() for entry in part_stats(run, shard)}


@pytest.mark.parametrize("grace", [20.0, 1.0], ids=["finishes what it holds", "releases it"])
@pytest.mark.slow
def test_a_worker_drains_within_its_grace_while_another_goes_on(
    fleet: Harness, expected: list[dict[str, Any]], grace: float
) -> None:
    environment = {"FAULT_BATCH_SECONDS": "0.4", "NERMILL_GRACE_SECONDS": str(grace)}
    leaving, staying = fleet.worker(**environment), fleet.worker(**environment)
    for worker in (leaving, staying):
        worker.await_ready()
    run, plan = fleet.submit(DOCUMENTS)
    fleet.until(run.committed)
    began = time.monotonic()
    assert leaving.terminate() == 0
    seconds = time.monotonic() - began
    print(f"drained in {seconds:.1f} s of {grace:.0f}")
    assert seconds < grace + DELAY

    fleet.wait(run, plan)
    assert rows(run) == expected
    assert attempts(run) == {1}
    with fleet.queue().ledger() as ledger:
        progress = ledger.progress(plan.run_id)
    assert (progress.redeliveries, progress.duplicates) == (0, 0)


@pytest.mark.slow
def test_a_worker_leaves_though_the_broker_does_not_answer(fleet: Harness, expected: list[dict[str, Any]]) -> None:
    environment = {"FAULT_BATCH_SECONDS": "0.4", "NERMILL_GRACE_SECONDS": "1"}
    leaving = fleet.worker(**environment)
    run, plan = fleet.submit(DOCUMENTS)
    fleet.until(run.committed)
    fleet.server.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert leaving.terminate() == 0
    seconds = time.monotonic() - began
    print(f"left in {seconds:.1f} s, its grace of 1 and those for the broker included")
    assert seconds < 1 + RELEASE_SECONDS + DELAY
    fleet.server.signal(signal.SIGCONT)
    fleet.worker()
    fleet.wait(run, plan)
    assert rows(run) == expected
