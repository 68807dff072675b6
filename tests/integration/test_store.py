"""Disks that are full or read-only, stores that fail or hang: no partial part, the worker stays, the run ends."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import tests.doubles.store  # noqa: F401 - makes faulty:// known
from nermill.worker.contracts.layout import DATASETS_FILE, SUCCESS_FILE, RunFolder
from nermill.worker.contracts.plan import Plan
from tests.harness import Harness, harness, rows, texts

FILE_LIMIT = 16 << 10
DOCUMENTS = texts(2000)
BIG_SHARDS = 1000  # documents, so that a part passes FILE_LIMIT


@pytest.fixture
def fleet() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> list[dict[str, object]]:
    """The table of a run without faults."""
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as fleet:
        fleet.worker()
        run, plan = fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS)
        fleet.wait(run, plan)
        return rows(run)


@contextmanager
def small_disk(fleet: Harness) -> Iterator[None]:
    """A file system of 4 MiB as the output folder."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(fleet.out)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(fleet.out)], check=True)


def fill(filler: Path) -> None:
    """Writes until the disk is full."""
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))


def give_back_then_end(fleet: Harness, run: RunFolder, plan: Plan, told: str, mend: list[list[str]]) -> None:
    """With the fault there, shards are given back by a worker that stays; without it, the run ends complete."""
    worker = fleet.workers[-1]
    await_log(fleet, told)
    assert worker.is_alive
    assert not run.committed()
    assert not [path.name for path in fleet.out.rglob(".*.parquet.*")], "a partial part is left"
    for command in mend:
        subprocess.run(command, check=True)
    fleet.wait(run, plan)
    assert worker.is_alive
    assert run.exists(SUCCESS_FILE)
    with fleet.queue().ledger() as ledger:
        assert ledger.progress(plan.run_id).redeliveries == 0, "a fault of the disk is no attempt"


def await_log(fleet: Harness, *told: str) -> None:
    fleet.until(
        lambda: any(all(words in line for words in ("given back", *told)) for line in fleet.logs().splitlines()), 60
    )


def test_a_full_disk(fleet: Harness, expected: list[dict[str, object]]) -> None:
    with small_disk(fleet):
        run, plan = fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS)
        filler = fleet.out / "filler"
        fill(filler)
        fleet.worker()
        give_back_then_end(fleet, run, plan, "(No space left on device); free space there", [["rm", str(filler)]])
        assert rows(run) == expected
        fleet.close()


def test_a_disk_that_turned_read_only(fleet: Harness, expected: list[dict[str, object]]) -> None:
    with small_disk(fleet):
        run, plan = fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS)
        subprocess.run(["mount", "-o", "remount,ro", str(fleet.out)], check=True)
        fleet.worker()
        writable = ["mount", "-o", "remount,rw", str(fleet.out)]
        give_back_then_end(fleet, run, plan, "(Read-only file system); mount it writable", [writable])
        assert rows(run) == expected
        fleet.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_that_turned_read_only(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS)
    Path(run.uri).chmod(0o555)
    fleet.worker()
    give_back_then_end(fleet, run, plan, "(Permission denied); give this user access", [["chmod", "755", run.uri]])
    assert rows(run) == expected


def test_a_limit_on_file_sizes(fleet: Harness, expected: list[dict[str, object]]) -> None:
    run, plan = fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS)
    pid = fleet.worker().process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
    lift = ["prlimit", "--pid", str(pid), f"--fsize={soft if soft > 0 else 'unlimited'}:"]
    give_back_then_end(fleet, run, plan, "(File too large); raise the limit on file sizes", [lift])
    assert hard == resource.RLIM_INFINITY
    assert all(os.path.getsize(run.path(f"part-0000{n}.parquet")) > FILE_LIMIT for n in (0, 1))
    assert rows(run) == expected


def test_a_file_where_the_folder_of_rejects_should_be(fleet: Harness) -> None:
    run, plan = fleet.submit(["Ada met Charles in London.", ""])
    obstacle = Path(run.path("_rejects"))
    obstacle.touch()
    fleet.worker()
    await_log(fleet, "put a folder in the place of that file")
    assert fleet.workers[-1].is_alive
    assert [row["reject_reason"] for row in rows(run)] == [None, "empty"], "a part needs no other file"
    assert not run.exists(SUCCESS_FILE)
    obstacle.unlink()
    fleet.wait(run, plan)
    assert run.exists(SUCCESS_FILE)
    assert run.list("_rejects") == ["rejects.parquet"]


@pytest.fixture
def store(fleet: Harness, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the faulty store keeps its files."""
    folder = fleet.folder / "store"
    folder.mkdir()
    monkeypatch.setenv("FAULT_STORE", str(folder))
    return folder


def submit_to_store(fleet: Harness) -> tuple[RunFolder, Plan]:
    return fleet.submit(DOCUMENTS, documents_per_shard=BIG_SHARDS, out="faulty://bucket")


def store_worker(fleet: Harness) -> None:
    fleet.worker(NERMILL_ALLOWED_ROOTS="faulty://bucket", FAULT_STORE_SECONDS="1")


def store_rows(store: Path, plan: Plan) -> list[dict[str, object]]:
    return rows(RunFolder(str(store / "bucket" / f"run={plan.run_id}")))


@pytest.mark.parametrize(("fault", "told"), [("500", "(500 Internal Server Error)"), ("hang", "(no answer in 1 s)")])
def test_a_store_that_fails_or_hangs(
    fleet: Harness, store: Path, expected: list[dict[str, object]], fault: str, told: str
) -> None:
    run, plan = submit_to_store(fleet)
    (store / ".fault").write_text(fault)
    store_worker(fleet)
    await_log(fleet, told)
    (store / ".fault").unlink()
    fleet.wait(run, plan)
    assert fleet.workers[-1].is_alive
    assert run.exists(SUCCESS_FILE)
    assert store_rows(store, plan) == expected


def test_a_store_that_fails_every_tenth_time(fleet: Harness, store: Path) -> None:
    documents = texts(160)
    _, plan = fleet.submit(documents, documents_per_shard=16, out="faulty://bucket")
    (store / ".fault").write_text("500 0.1")
    store_worker(fleet)
    deadline = time.monotonic() + 90
    folder = store / "bucket" / f"run={plan.run_id}"
    while not (folder / SUCCESS_FILE).exists():
        assert time.monotonic() < deadline, fleet.logs()
        time.sleep(0.1)
    (store / ".fault").unlink()
    assert [row["doc_id"] for row in store_rows(store, plan)] == [f"d{n}" for n in range(len(documents))]
    assert "given back" in fleet.logs()


def test_what_a_killed_writer_left_is_swept(fleet: Harness) -> None:
    run, plan = fleet.submit(texts(64))
    once = {"FAULT_DIE_AT": "sync", "FAULT_ONCE_FILE": str(fleet.folder / "died")}
    fleet.worker(**once).process.wait(30)
    assert [name for name in run.list() if name.startswith(".part-00000.parquet.")]
    assert not run.committed()
    fleet.worker(**once)
    fleet.wait(run, plan)
    assert run.exists(SUCCESS_FILE)
    assert [name for name in run.list() if name.startswith(".")] == [DATASETS_FILE]
