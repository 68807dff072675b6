"""Whatever is killed, repeated or lost on the way: every document once, and the same table."""

from __future__ import annotations

import signal
import time

import pytest

from nermill.producer.runs.run import resume, send
from nermill.worker.contracts.layout import SUCCESS_FILE
from nermill.worker.contracts.message import TAG_SHARD
from tests.chaos import undisturbed
from tests.harness import Harness, rows, texts

DOCUMENTS = texts(600)


@pytest.fixture(scope="module")
def expected() -> list[dict[str, object]]:
    """The table of an undisturbed run of one worker."""
    table = undisturbed(len(DOCUMENTS))
    assert [row["doc_id"] for row in table] == [f"d{n}" for n in range(len(DOCUMENTS))]
    assert sum(len(row["entities"]) for row in table) > len(DOCUMENTS)
    return table


def test_messages_sent_twice_and_late_or_second_workers_change_nothing(
    fleet: Harness, expected: list[dict[str, object]]
) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    for shard in plan.shards * 3:
        fleet.app().send_task(TAG_SHARD, args=(plan.run_id, run.uri, shard.index), queue="nermill")
    fleet.worker(FAULT_BATCH_SECONDS="0.02")
    fleet.worker(FAULT_BATCH_SECONDS="0.02")
    fleet.wait(run, plan)
    assert rows(run) == expected
    assert run.exists(SUCCESS_FILE)


def test_lost_messages_are_sent_again(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    with fleet.server.client() as client:
        assert sum(client.delete(key) for key in fleet.message_lists(client)) == 1
    fleet.worker()
    fleet.wait(run, plan)
    assert rows(run) == expected


@pytest.mark.slow
def test_a_killed_workers_shards_run_again_within_its_lease(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    killed_worker = fleet.worker(FAULT_BATCH_SECONDS="0.3")
    fleet.until(run.committed)
    killed_worker.kill()
    killed = time.monotonic()
    fleet.worker()
    fleet.wait(run, plan)
    assert rows(run) == expected
    assert time.monotonic() - killed < fleet.lease_seconds + 15


def test_a_worker_that_is_told_to_stop_finishes_or_releases(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    leaving = fleet.worker(FAULT_BATCH_SECONDS="0.2")
    fleet.until(run.committed)
    leaving.terminate()
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).leased == 0
    fleet.worker()
    fleet.wait(run, plan)
    assert rows(run) == expected
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).redeliveries == 0


@pytest.mark.slow
def test_a_worker_that_sleeps_past_its_lease_writes_nothing_that_counts(
    fleet: Harness, expected: list[dict[str, object]]
) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    late = fleet.worker(FAULT_BATCH_SECONDS="0.2")
    fleet.until(run.committed)
    late.signal(signal.SIGSTOP)
    fleet.worker()
    fleet.wait(run, plan)
    late.signal(signal.SIGCONT)
    late.terminate()
    assert rows(run) == expected
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).ok == len(DOCUMENTS)


@pytest.mark.parametrize("point", ["rename", "done", "ack"])
@pytest.mark.slow
def test_death_between_commit_ledger_and_acknowledgement(
    fleet: Harness, expected: list[dict[str, object]], point: str
) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    once = {"FAULT_DIE_AT": point, "FAULT_ONCE_FILE": str(fleet.folder / "died")}
    first = fleet.worker(**once)
    first.process.wait(30)
    fleet.worker(**once)
    fleet.wait(run, plan)
    assert rows(run) == expected
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).ok == len(DOCUMENTS)


def test_losing_the_whole_server_loses_progress_only(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    fleet.worker(FAULT_BATCH_SECONDS="0.1")
    fleet.until(run.committed)
    with fleet.server.client() as client:
        client.flushall()
    resume(run, plan, fleet.queue())
    fleet.wait(run, plan)
    assert rows(run) == expected


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS)
    fleet.worker(FAULT_BATCH_SECONDS="0.1")
    fleet.until(run.committed)
    fleet.server.kill()
    time.sleep(1)
    fleet.server.start()
    fleet.wait(run, plan)
    assert rows(run) == expected


@pytest.mark.slow
def test_documents_that_kill_their_worker_are_rejected_alone(fleet: Harness) -> None:
    documents = texts(256)
    documents[40] = documents[200] = "this one is poison"
    run, _ = fleet.submit(documents, documents_per_shard=256)
    environment = {"FAULT_ABORT_WORD": "poison", "NERMILL_LEASE_SECONDS": "1"}
    worker = fleet.worker(**environment)
    deadline = time.monotonic() + 100
    while not run.exists(SUCCESS_FILE):
        assert time.monotonic() < deadline, fleet.logs()
        if not worker.is_alive:
            worker.start()
        time.sleep(0.1)
    table = rows(run)
    rejected = [row["doc_id"] for row in table if row["status"] == "rejected"]
    assert rejected == ["d40", "d200"]
    assert len(table) == 256
    assert all(row["entities"] for row in table if row["status"] == "ok")
    assert worker.starts <= 24


def test_a_hanging_device_ends_its_process(fleet: Harness) -> None:
    documents = texts(64)
    documents[5] = "poison"
    fleet.submit(documents)
    hanging = fleet.worker(FAULT_HANG_WORD="poison", NERMILL_HANG_SECONDS="2")
    assert hanging.process.wait(30) == 75


def test_sending_a_finished_run_again_is_no_work(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(64))
    fleet.worker()
    fleet.wait(run, plan)
    assert send(run, plan, fleet.queue()) == 0
