"""A run's evaluation happens by itself, once, on whichever worker is there; nobody but the workers takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.run import send
from nermill.producer.runs.shards import ShardLimits
from nermill.worker.contracts.layout import REPORT_HTML, REPORT_JSON, SUCCESS_FILE, RunFolder
from nermill.worker.contracts.message import FINISH, FINISH_RUN, KEY_PREFIX, QUEUE
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.records import RunState
from tests.harness import Harness, texts

SENTENCE = "Anna B-PER\nflew O\nto O\nRome B-LOC\n. O\n\n"


def submit(fleet: Harness, sentences: int, per_shard: int) -> tuple[RunFolder, Plan]:
    """Sends a run with gold tags, and looks after it no more."""
    source = fleet.folder / "gold.conll"
    source.write_text(SENTENCE * sentences, "utf-8")
    run, plan = make_plan(Request((str(source),), str(fleet.out), limits=ShardLimits(documents=per_shard)))
    send(run, plan, fleet.queue())
    return run, plan


def lines_of(trace: Path) -> list[tuple[float, str]]:
    """When what was done, as the processes wrote it down."""
    lines = trace.read_text("utf-8").splitlines() if trace.exists() else []
    return [(float(at), deed) for at, deed in (line.split(" ", 1) for line in lines)]


def deeds(trace: Path) -> Counter[str]:
    """How often each thing was done, by all processes together."""
    return Counter(deed for _, deed in lines_of(trace))


def await_report(fleet: Harness, run: RunFolder) -> dict[str, Any]:
    fleet.until(lambda: run.exists(REPORT_JSON), 60)
    report: dict[str, Any] = json.loads(run.read(REPORT_JSON))
    return report


def await_closed(fleet: Harness, plan: Plan) -> None:
    """Waits until the ledger says that the run's last step is done."""
    with fleet.queue().ledger() as ledger:
        fleet.until(lambda: ledger.progress(plan.run_id).state == RunState.FINISHED, 20)


def repeat(fleet: Harness, run: RunFolder, plan: Plan) -> list[str]:
    """Sends the message of the run's last step five times more; returns the states of their results."""
    app = fleet.app()
    sent = [app.send_task(FINISH_RUN, args=(plan.run_id, run.uri), queue=QUEUE) for _ in range(5)]
    return [result.get(timeout=20)["state"] for result in sent]


@pytest.mark.slow
def test_it_happens_once_though_the_last_two_shards_end_together(fleet: Harness) -> None:
    meeting, trace = fleet.folder / "meeting", fleet.folder / "trace"
    meeting.mkdir()
    faults = {"FAULT_MEET": str(meeting), "FAULT_TRACE": str(trace), "FAULT_EVALUATION_SECONDS": "1"}
    workers = [fleet.worker(NERMILL_CONCURRENCY="1", **faults) for _ in range(2)]
    for worker in workers:
        worker.await_ready()
    run, plan = submit(fleet, 40, per_shard=20)
    report = await_report(fleet, run)
    await_closed(fleet, plan)
    assert set(repeat(fleet, run, plan)) == {"not due"}
    assert len(list(meeting.iterdir())) == 2, "both workers had a shard, and told of it together"
    assert deeds(trace)["evaluates"] == deeds(trace)["evaluated"] == 1, fleet.logs()
    assert (report["documents"], report["support"], report["warnings"]) == (40, 80, [])
    assert len(report["throughput"]["workers"]) == 2


@pytest.mark.slow
def test_it_happens_once_more_after_a_kill_in_the_middle_of_it(fleet: Harness) -> None:
    trace = fleet.folder / "trace"
    run, plan = submit(fleet, 40, per_shard=20)
    doomed = fleet.worker(FAULT_TRACE=str(trace), FAULT_EVALUATION_SECONDS="60")
    fleet.until(lambda: deeds(trace)["evaluates"], 30)
    doomed.kill()
    assert run.exists(SUCCESS_FILE)
    assert not run.exists(REPORT_JSON)
    for _ in range(2):
        fleet.worker(FAULT_TRACE=str(trace), FAULT_EVALUATION_SECONDS="1")
    report = await_report(fleet, run)
    await_closed(fleet, plan)
    assert set(repeat(fleet, run, plan)) == {"not due"}
    assert (deeds(trace)["evaluates"], deeds(trace)["evaluated"]) == (2, 1), fleet.logs()
    assert report["documents"] == 40


@pytest.mark.slow
def test_the_headline_scores_of_a_run_are_seqevals(fleet: Harness) -> None:
    run, plan = submit(fleet, 40, per_shard=20)
    fleet.worker()
    report = await_report(fleet, run)
    assert report["headline"] == {"by": "seqeval", "version": version("seqeval"), "largest_difference": ANY}
    await_closed(fleet, plan)


def test_evaluations_keep_no_other_run_waiting(fleet: Harness) -> None:
    trace = fleet.folder / "trace"
    gold = [submit(fleet, sentences, per_shard=20)[0] for sentences in (20, 40)]
    fleet.worker(FAULT_TRACE=str(trace), FAULT_EVALUATION_SECONDS="6")
    fleet.until(lambda: deeds(trace)["evaluates"] == len(gold))
    run, _ = fleet.submit(texts(40))
    fleet.until(lambda: run.exists(SUCCESS_FILE))
    assert not any(evaluated.exists(REPORT_JSON) for evaluated in gold)


@pytest.mark.slow
def test_a_waiting_producer_leaves_a_long_evaluation_to_its_worker(
    fleet: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nermill.producer.runs.run.SETTLE_SECONDS", 0.5)
    trace = fleet.folder / "trace"
    run, plan = submit(fleet, 40, per_shard=20)
    fleet.worker(FAULT_TRACE=str(trace), FAULT_EVALUATION_SECONDS="4")
    fleet.wait(run, plan)
    assert deeds(trace)["evaluated"] == 1
    assert run.exists(REPORT_HTML)


def test_a_waiting_producer_ends_though_the_only_worker_died_in_the_evaluation(
    fleet: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nermill.producer.runs.run.SETTLE_SECONDS", 0.5)
    trace = fleet.folder / "trace"
    run, plan = submit(fleet, 40, per_shard=20)
    doomed = fleet.worker(FAULT_TRACE=str(trace), FAULT_EVALUATION_SECONDS="60")
    fleet.until(lambda: deeds(trace)["evaluates"], 30)
    doomed.kill()
    assert fleet.wait(run, plan, timeout=fleet.lease_seconds + 15).state == "complete"
    assert run.exists(SUCCESS_FILE)
    assert not run.exists(REPORT_JSON), "what the command does next"


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_complete_run_that_lost_its_report_is_evaluated_again_when_it_is_sent_again(
    fleet: Harness, is_forgotten: bool
) -> None:
    run, plan = submit(fleet, 4, per_shard=2)
    fleet.worker()
    await_report(fleet, run)
    await_closed(fleet, plan)
    for name in (REPORT_JSON, REPORT_HTML):
        run.remove(name)
    queue = fleet.queue()
    if is_forgotten:
        queue.drop(plan.run_id)
    send(run, plan, queue)
    assert await_report(fleet, run)["documents"] == 4
    await_closed(fleet, plan)


def test_an_evaluation_that_ends_every_process_is_left_alone(fleet: Harness) -> None:
    trace = fleet.folder / "trace"
    run, plan = submit(fleet, 4, per_shard=4)
    with fleet.server.client() as client:
        client.hset(f"{KEY_PREFIX}run:{plan.run_id}:attempts", FINISH, 3)  # as after three kills in the middle of it
    fleet.worker(FAULT_TRACE=str(trace))
    fleet.until(lambda: run.exists(SUCCESS_FILE))
    await_closed(fleet, plan)
    assert not run.exists(REPORT_JSON)
    assert deeds(trace)["evaluates"] == 0
    assert "no report: 3 attempts" in fleet.logs()


@pytest.mark.slow
def test_what_workers_measure_is_what_their_devices_did(fleet: Harness) -> None:
    """Two devices, one paced twice as slow as the other; the batches that they computed are counted as they go."""
    paces = {"npu:0": 0.2, "npu:1": 0.4}
    traces = {device: fleet.folder / device for device in paces}
    for device, pace in paces.items():
        fleet.worker(
            NERMILL_DEVICE_NAME=device,
            NERMILL_CONCURRENCY="4",  # two of them are kept for the common queue
            FAULT_BATCH_SECONDS=str(pace),
            FAULT_TRACE=str(traces[device]),
        ).await_ready()
    warm = {device: deeds(trace)["batch"] for device, trace in traces.items()}
    run, _ = submit(fleet, 4_000, per_shard=200)
    throughput = await_report(fleet, run)["throughput"]
    rows = {row["device"]: row for row in throughput["devices"]}
    assert set(rows) == set(paces)
    for device, row in rows.items():
        ends = [at for at, deed in lines_of(traces[device]) if deed == "batch"][warm[device] :]
        computed, lasted = paces[device] * len(ends), ends[-1] - ends[0] + paces[device]
        assert row["compute_seconds"] == pytest.approx(computed, rel=0.15)
        assert row["busy_share"] == pytest.approx(computed / lasted, rel=0.1)
        assert row["documents_per_second"] == pytest.approx(row["documents"] / lasted, rel=0.1)
    assert sum(row["documents"] for row in rows.values()) == 4_000
    stages = throughput["stages"]
    assert set(stages) == {"queue", "tokenize", "wait", "compute", "decode", "write", "shard"}
    assert 0 < stages["queue"]["p50"] < stages["queue"]["p99"] < 60, "later shards waited longer to be claimed"
    assert 0 < stages["write"]["p50"] < 5


@pytest.mark.parametrize("is_early", [True, False])
def test_an_evaluation_ends_with_the_worker_that_started_it(fleet: Harness, is_early: bool) -> None:
    plan = fleet.folder / "_plan.json"
    os.mkfifo(plan)  # to read it lasts as long as somebody may write
    code = f"from nermill.worker.queue.finish import evaluate_apart; evaluate_apart({str(fleet.folder)!r})"
    with ExitStack() as stack, subprocess.Popen([sys.executable, "-c", code]) as worker:
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
        fleet.until(children.read_text, 20)
        evaluation = Path("/proc", children.read_text().strip())
        if not is_early:
            stack.enter_context(plan.open("wb"))  # once the evaluation reads it
        worker.kill()
        fleet.until(lambda: not evaluation.exists() or ") Z" in (evaluation / "stat").read_text(), 20)
