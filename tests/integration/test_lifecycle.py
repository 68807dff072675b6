"""Cancel, resume and retry against real workers; ``_SUCCESS`` stands exactly where every shard has its part."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nermill.producer.runs.rejects import read_rejects, retry
from nermill.producer.runs.run import cancel, open_run, resume, wait
from nermill.producer.runs.status import look
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder
from nermill.worker.contracts.plan import Plan
from tests.chaos import undisturbed
from tests.harness import Harness, rows, texts

DOCUMENTS = texts(640)


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return undisturbed(len(DOCUMENTS))


def submit(fleet: Harness) -> tuple[RunFolder, Plan]:
    return fleet.submit(DOCUMENTS, documents_per_shard=32)


@pytest.mark.slow
def test_a_cancelled_run_says_so_keeps_its_parts_and_is_taken_up_again(
    fleet: Harness, expected: list[dict[str, Any]]
) -> None:
    run, plan = submit(fleet)
    fleet.worker(FAULT_BATCH_SECONDS="0.3", NERMILL_CONCURRENCY="2")
    fleet.until(lambda: len(run.committed()) >= 2)
    code, told = fleet.ask("cancel", run.uri)
    assert (code, told["state"]) == (0, "cancelled")
    status = fleet.wait(run, plan.cancel(run))
    assert status.state == "cancelled"
    kept = run.committed()
    assert 2 <= len(kept) < len(plan.shards)
    time.sleep(1.5)
    assert run.committed() == kept, "what had not started is not started any more"
    assert not run.exists(SUCCESS_FILE)
    code, told = fleet.ask("status", run.uri)
    assert (code, told["state"], told["shards"]["committed"]) == (3, "cancelled", len(kept))

    written = {shard: Path(run.path(f"part-{shard:05d}.parquet")).stat().st_mtime_ns for shard in kept}
    plan = resume(*open_run(run.uri), fleet.queue())
    assert not plan.cancelled
    assert fleet.wait(run, plan).state == "complete"
    assert rows(run) == expected
    assert written == {s: Path(run.path(f"part-{s:05d}.parquet")).stat().st_mtime_ns for s in kept}
    assert fleet.ask("status", run.uri)[0] == 0


def test_a_run_that_somebody_else_cancels_is_not_sent_again_by_who_waits_for_it(fleet: Harness) -> None:
    run, plan = submit(fleet)
    cancel(run, plan, fleet.queue())
    looks = itertools.count()

    def look_again(_: object) -> None:
        assert next(looks) < 20, "it goes on to wait"

    assert wait(run, plan, fleet.queue(), look_again).state == "cancelled"


def test_cancelling_a_run_that_is_complete_changes_nothing(fleet: Harness) -> None:
    run, plan = submit(fleet)
    fleet.worker()
    fleet.wait(run, plan)
    assert not cancel(run, plan, fleet.queue()).cancelled
    assert look(*open_run(run.uri)).state == "complete"


def test_success_is_said_when_every_shard_has_its_part_and_not_before(fleet: Harness) -> None:
    run, plan = submit(fleet)
    fleet.worker(FAULT_BATCH_SECONDS="0.05")
    fleet.worker(FAULT_BATCH_SECONDS="0.05")
    everything = {shard.index for shard in plan.shards}
    fleet.until(lambda: run.exists(SUCCESS_FILE), 60)
    assert run.committed() == everything


@pytest.mark.slow
def test_a_slow_device_takes_no_more_shards_than_it_is_about_to_compute(fleet: Harness) -> None:
    fleet.worker(FAULT_BATCH_SECONDS="0.3", NERMILL_CONCURRENCY="8").await_ready()
    run, plan = fleet.submit(texts(900), documents_per_shard=100)  # a shard is two of its batches
    leased = []
    with fleet.queue().ledger() as ledger:

        def is_done() -> bool:
            leased.append(ledger.progress(plan.run_id).leased)
            return run.exists(SUCCESS_FILE)

        fleet.until(is_done)
    assert 3 <= median(leased) <= 5, "what waits for the device, and what is on its way to it and back"


@pytest.mark.slow
def test_a_dead_workers_shards_are_taken_up_within_its_lease_and_five_seconds(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(640), documents_per_shard=16)
    doomed, _ = [fleet.worker(FAULT_BATCH_SECONDS="0.3", NERMILL_CONCURRENCY="4") for _ in range(2)]
    fleet.until(lambda: len(run.committed()) >= 8)
    key = f"nermill:run:{plan.run_id}"
    with fleet.server.client() as client:
        held = {shard: client.hget(f"{key}:tokens", shard) for shard in client.zrange(f"{key}:leases", 0, -1)}
        doomed.kill()
        killed = time.monotonic()
        while any(client.zscore(f"{key}:leases", s) and client.hget(f"{key}:tokens", s) == t for s, t in held.items()):
            assert time.monotonic() < killed + fleet.lease_seconds + 5, fleet.logs()
            time.sleep(0.05)
    fleet.wait(run, plan)
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).redeliveries > 0
    assert len(rows(run)) == 640


def test_resume_may_be_said_at_any_time_any_number_of_times(fleet: Harness, expected: list[dict[str, Any]]) -> None:
    run, plan = submit(fleet)
    fleet.worker(FAULT_BATCH_SECONDS="0.1")
    while not run.exists(SUCCESS_FILE):
        resume(*open_run(run.uri), fleet.queue())
        time.sleep(0.2)
    fleet.wait(run, plan)
    resume(*open_run(run.uri), fleet.queue())
    assert rows(run) == expected
    with fleet.queue().ledger() as ledger:
        progress = ledger.progress(plan.run_id)
    assert (progress.ok, progress.duplicates, progress.redeliveries) == (len(DOCUMENTS), 0, 0)


def test_a_part_that_was_taken_away_is_made_again(fleet: Harness, expected: list[dict[str, Any]]) -> None:
    run, plan = submit(fleet)
    fleet.worker()
    fleet.wait(run, plan)
    run.remove("part-00003.parquet")
    fleet.workers[0].kill()
    resume(run, plan, fleet.queue())
    assert not run.exists(SUCCESS_FILE), "the run is not complete while a part is missing"
    fleet.worker()
    fleet.wait(run, plan)
    assert run.exists(SUCCESS_FILE)
    assert rows(run) == expected


def test_rejects_are_tried_again_once_the_cause_is_gone(fleet: Harness) -> None:
    documents = texts(96)
    documents[5] = documents[70] = "this one is poison"
    documents[40] = ""
    run, plan = fleet.submit(documents, documents_per_shard=32)
    refusing = fleet.worker(FAULT_REFUSE_WORD="poison")
    assert fleet.wait(run, plan).rejected == 3
    found = {row["doc_id"]: row["reason"] for row in read_rejects(run, plan)}
    assert found == {"d5": "model_failure", "d40": "empty", "d70": "model_failure"}
    refusing.terminate()

    assert retry(run, plan, fleet.queue()) == (2, 1, 0)
    assert not run.exists(SUCCESS_FILE)
    assert run.committed() == {1}, "a shard whose documents are themselves at fault is left alone"
    fleet.worker()
    status = fleet.wait(run, plan)
    assert (status.state, status.ok, status.rejected) == ("complete", 95, 1)
    assert run.exists(SUCCESS_FILE)
    assert [row["doc_id"] for row in read_rejects(run, plan)] == ["d40"]
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(96)]
    assert retry(run, plan, fleet.queue()) == (0, 1, 0)


@pytest.mark.slow
def test_the_tokens_of_a_single_huge_document_show_how_far_it_is(fleet: Harness) -> None:
    """``--wait`` says so every ten seconds; ``status`` at any time."""
    fleet.worker(FAULT_BATCH_SECONDS="0.3").await_ready()
    seen: list[tuple[int, int]] = []

    def look_again() -> bool:
        _, told = fleet.ask("status", run.uri)
        seen.append((told["at_work"]["computed"], told["at_work"]["tokens"]))
        return len({computed for computed, total in seen if total}) >= 3

    with fleet.submitting(["Ada met Bob. " * 10_000]) as process:
        log = fleet.folder / "producer.log"
        fleet.until(lambda: any(fleet.out.glob("run=*/_plan.json")))
        run = RunFolder(str(next(fleet.out.glob("run=*"))))
        fleet.until(look_again)
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, log.read_text()
    totals = {total for _, total in seen if total}
    assert len(totals) == 1
    assert 0 <= seen[-1][0] <= totals.pop()
    assert [computed for computed, _ in seen] == sorted(computed for computed, _ in seen)
    assert re.search(r"0/1 documents, the first are at work: [1-9][\d,]* of [\d,]+ tokens", log.read_text())
    assert json.loads(out)["at_work"] == {"tokens": 0, "computed": 0}
