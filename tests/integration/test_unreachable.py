"""A run whose folder a worker cannot see, and errors that are no fault of a store, a device or the ledger."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import tests.doubles.store  # noqa: F401 - makes faulty:// known
from nermill.producer.runs.run import resume
from nermill.producer.runs.status import look
from nermill.worker.contracts.errors import StoreError, UnreachableError
from nermill.worker.contracts.layout import SUCCESS_FILE
from nermill.worker.contracts.store import store_errors
from tests.harness import Harness, Worker, texts


@pytest.fixture
def stores(fleet: Harness, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The store as the producer sees it, and an empty one that a worker on another machine sees under its name."""
    mine, other = fleet.folder / "mine", fleet.folder / "other"
    mine.mkdir()
    other.mkdir()
    monkeypatch.setenv("FAULT_STORE", str(mine))
    return mine, other


def worker(fleet: Harness, store: Path, **environment: str) -> Worker:
    return fleet.worker(FAULT_STORE=str(store), NERMILL_ALLOWED_ROOTS="faulty://bucket", **environment)


def test_a_run_that_no_worker_can_see_ends_the_waiting_with_the_reason(
    fleet: Harness, stores: tuple[Path, Path]
) -> None:
    mine, other = stores
    run, plan = fleet.submit(texts(64), out="faulty://bucket")
    worker(fleet, other).await_ready()
    with pytest.raises(StoreError, match=r"none of 1 workers can serve it: nermill-cpu@.*shard-00000.arrow.*resume"):
        fleet.wait(run, plan, timeout=60)
    status = look(run, plan, fleet.queue())
    assert status.progress.blocked
    assert "shard-00000.arrow" in status.trouble
    fleet.workers[0].kill()
    worker(fleet, mine)
    resume(run, plan, fleet.queue())
    fleet.wait(run, plan)
    assert run.committed() == {0}


@pytest.mark.slow
def test_a_worker_that_cannot_see_a_run_leaves_it_to_one_that_can(fleet: Harness, stores: tuple[Path, Path]) -> None:
    mine, other = stores
    worker(fleet, other).await_ready()
    worker(fleet, mine, FAULT_BATCH_SECONDS="0.2").await_ready()
    run, plan = fleet.submit(texts(600), out="faulty://bucket")
    status = fleet.wait(run, plan, timeout=90)
    assert status.ok == 600
    (name,) = status.workers
    assert name.startswith("nermill-cpu@")


@pytest.mark.slow
def test_a_worker_that_cannot_see_a_run_leaves_its_last_step_too(fleet: Harness, stores: tuple[Path, Path]) -> None:
    mine, other = stores
    able = worker(fleet, mine)
    able.await_ready()
    blind = worker(fleet, other)
    blind.await_ready()
    for number in range(4):  # the last step is either's, by chance
        run, _ = fleet.submit(texts(8 + number), out="faulty://bucket")
        deadline = time.monotonic() + 60
        while not run.exists(SUCCESS_FILE):
            assert time.monotonic() < deadline, fleet.logs()
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file"), UnreachableError),
        (PermissionError(13, "Permission denied"), UnreachableError),
        (OSError(28, "No space left on device"), StoreError),
        (ValueError("the store's own"), StoreError),
        (AttributeError("ours"), AttributeError),
        (NameError("ours"), NameError),
    ],
)
def test_what_the_store_raises_is_its_fault_and_defects_of_ours_are_not(
    error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected) as caught, store_errors("read", "/out/file"):
        raise error
    assert type(caught.value) is expected


def test_unexpected_errors_are_logged_counted_and_end_the_process(fleet: Harness) -> None:
    run, _ = fleet.submit(texts(256), documents_per_shard=64)
    broken = fleet.worker(FAULT_DEFECT="1")
    assert broken.process.wait(60) == 75
    told = fleet.logs()
    assert "AttributeError: a defect" in told  # of the last one; the process may end before others are logged
    assert "3 unexpected errors; this process ends and is started again" in told
    assert not run.committed()
    began = time.monotonic()
    fleet.worker()
    fleet.until(lambda: len(run.committed()) == 4)
    assert time.monotonic() - began < 60
