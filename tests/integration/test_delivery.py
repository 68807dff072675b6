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
    mill: Harness, expected: list[dict[str, object]]
) -> None:
    run, plan = mill.submit(DOCUMENTS)
    for shard in plan.shards * 3:
        mill.app().send_task(TAG_SHARD, args=(plan.run_id, run.uri, shard.index), queue="nermill")
    mill.worker(FAULT_BATCH_SECONDS="0.02")
    mill.worker(FAULT_BATCH_SECONDS="0.02")
    mill.wait(run, plan)
    assert rows(run) == expected
    assert run.exists(SUCCESS_FILE)


def test_lost_messages_are_sent_again(mill: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = mill.submit(DOCUMENTS)
    with mill.server.client() as client:
        assert sum(client.delete(key) for key in mill.message_lists(client)) == 1
    mill.worker()
    mill.wait(run, plan)
    assert rows(run) == expected


def test_a_killed_workers_shards_run_again_within_its_lease(mill: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = mill.submit(DOCUMENTS)
    killed_worker = mill.worker(FAULT_BATCH_SECONDS="0.3")
    mill.until(run.committed)
    killed_worker.kill()
    killed = time.monotonic()
    mill.worker()
    mill.wait(run, plan)
    assert rows(run) == expected
    assert time.monotonic() - killed < mill.lease_seconds + 15


def test_a_worker_that_is_told_to_stop_finishes_or_releases(mill: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = mill.submit(DOCUMENTS)
    leaving = mill.worker(FAULT_BATCH_SECONDS="0.2")
    mill.until(run.committed)
    leaving.terminate()
    with mill.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).leased == 0
    mill.worker()
    mill.wait(run, plan)
    assert rows(run) == expected
    with mill.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).redeliveries == 0


def test_a_worker_that_sleeps_past_its_lease_writes_nothing_that_counts(
    mill: Harness, expected: list[dict[str, object]]
) -> None:
    run, plan = mill.submit(DOCUMENTS)
    late = mill.worker(FAULT_BATCH_SECONDS="0.2")
    mill.until(run.committed)
    late.signal(signal.SIGSTOP)
    mill.worker()
    mill.wait(run, plan)
    late.signal(signal.SIGCONT)
    late.terminate()
    assert rows(run) == expected
    with mill.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).ok == len(DOCUMENTS)


@pytest.mark.parametrize("point", ["rename", "done", "ack"])
def test_death_between_commit_ledger_and_acknowledgement(
    mill: Harness, expected: list[dict[str, object]], point: str
) -> None:
    run, plan = mill.submit(DOCUMENTS)
    once = {"FAULT_DIE_AT": point, "FAULT_ONCE_FILE": str(mill.folder / "died")}
    first = mill.worker(**once)
    first.process.wait(30)
    mill.worker(**once)
    mill.wait(run, plan)
    assert rows(run) == expected
    with mill.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).ok == len(DOCUMENTS)


def test_losing_the_whole_server_loses_progress_only(mill: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = mill.submit(DOCUMENTS)
    mill.worker(FAULT_BATCH_SECONDS="0.1")
    mill.until(run.committed)
    with mill.server.client() as client:
        client.flushall()
    resume(run, plan, mill.queue())
    mill.wait(run, plan)
    assert rows(run) == expected


def test_a_server_that_is_killed_and_started_again(mill: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = mill.submit(DOCUMENTS)
    mill.worker(FAULT_BATCH_SECONDS="0.1")
    mill.until(run.committed)
    mill.server.kill()
    time.sleep(1)
    mill.server.start()
    mill.wait(run, plan)
    assert rows(run) == expected


def test_documents_that_kill_their_worker_are_rejected_alone(mill: Harness) -> None:
    documents = texts(256)
    documents[40] = documents[200] = "this one is poison"
    run, _ = mill.submit(documents, documents_per_shard=256)
    environment = {"FAULT_ABORT_WORD": "poison", "NERMILL_LEASE_SECONDS": "1"}
    worker = mill.worker(**environment)
    deadline = time.monotonic() + 100
    while not run.exists(SUCCESS_FILE):
        assert time.monotonic() < deadline, mill.logs()
        if not worker.is_alive:
            worker.start()
        time.sleep(0.1)
    table = rows(run)
    rejected = [row["doc_id"] for row in table if row["status"] == "rejected"]
    assert rejected == ["d40", "d200"]
    assert len(table) == 256
    assert all(row["entities"] for row in table if row["status"] == "ok")
    assert worker.starts <= 24


def test_a_hanging_device_ends_its_process(mill: Harness) -> None:
    documents = texts(64)
    documents[5] = "poison"
    mill.submit(documents)
    hanging = mill.worker(FAULT_HANG_WORD="poison", NERMILL_HANG_SECONDS="2")
    assert hanging.process.wait(30) == 75


def test_sending_a_finished_run_again_is_no_work(mill: Harness) -> None:
    run, plan = mill.submit(texts(64))
    mill.worker()
    mill.wait(run, plan)
    assert send(run, plan, mill.queue()) == 0
