"""A new model while a run is at work: every part of a run is of one artifact, and people see what it waits for."""

from __future__ import annotations

import time

import pyarrow.parquet as pq
import pytest

from nermill.producer.runs.run import resume
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.contracts.schema import metadata_of
from tests.doubles.engine import manifest
from tests.harness import REAL, Harness, Worker, rows, texts

DOCUMENTS = texts(1_200)
OLD = manifest().sha256
NEW = load_manifest(resolve_artifact("demo")).sha256


def start_old(fleet: Harness, batch_seconds: float = 0.0) -> Worker:
    """A worker of the artifact that is to go: the double, which can be told how long it takes."""
    worker = fleet.worker(FAULT_BATCH_SECONDS=str(batch_seconds), NERMILL_CONCURRENCY="3")
    worker.await_ready()
    return worker


def start_new(fleet: Harness) -> Worker:
    """A worker of the artifact that comes: the demo model."""
    worker = fleet.worker(REAL)
    worker.await_ready()
    return worker


def artifacts(run: RunFolder) -> set[str]:
    """The artifacts that made the run's parts, as the parts say."""
    found = (metadata_of(pq.read_schema(run.path(name))) for name in run.list() if name.startswith("part-"))
    return {metadata["artifact_sha256"] for metadata in found}


@pytest.mark.slow
def test_a_run_ends_with_the_artifact_that_began_it_and_the_next_takes_the_new_one(fleet: Harness) -> None:
    leaving = [start_old(fleet, 0.8) for _ in range(2)]
    run, plan = fleet.submit(DOCUMENTS, documents_per_shard=32)
    fleet.until(lambda: len(run.committed()) >= 2)
    start_new(fleet)
    for worker in leaving:
        assert worker.terminate() == 0
    made = run.committed()
    assert len(made) < len(plan.shards), "the run was over before its workers were"

    after, next_plan = fleet.submit(DOCUMENTS[:320], out=str(fleet.out / "next"))
    fleet.wait(after, next_plan)
    assert artifacts(after) == {NEW}, "a run that waits is in nobody's way"
    assert run.committed() == made

    code, status = fleet.ask("status", run.uri)
    assert (code, status["state"]) == (3, "running")
    assert f"no worker serves the artifact that the run asks for, {OLD[:12]}" in status["trouble"]
    assert "minilm" in status["trouble"]
    assert "nermill-worker --model" in status["trouble"]
    code, doctor = fleet.ask("doctor", "--out", str(fleet.out))
    (workers,) = [finding for finding in doctor["findings"] if finding["name"] == "workers"]
    assert (code, workers["ok"]) == (1, False)
    assert OLD[:12] in workers["detail"]

    start_old(fleet)
    fleet.wait(run, plan)
    assert artifacts(run) == {OLD}
    assert [row["doc_id"] for row in rows(run)] == [f"d{n}" for n in range(len(DOCUMENTS))]
    assert fleet.ask("status", run.uri)[1]["trouble"] == ""


@pytest.mark.slow
def test_a_run_stays_with_its_artifact_though_the_broker_forgot_it(fleet: Harness) -> None:
    worker = start_old(fleet, 0.4)
    run, plan = fleet.submit(DOCUMENTS[:480], documents_per_shard=32)
    fleet.until(lambda: len(run.committed()) >= 2)
    worker.terminate()
    made = run.committed()
    with fleet.server.client() as client:
        client.flushall()
    start_new(fleet)
    resume(run, plan, fleet.queue())
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).artifact == OLD
    time.sleep(fleet.lease_seconds / 3 + 1)  # bells are rung again for what waits
    assert run.committed() == made
    start_old(fleet)
    fleet.wait(run, plan)
    assert artifacts(run) == {OLD}
