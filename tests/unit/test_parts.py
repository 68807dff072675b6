"""A part is the only file of a shard: its rejects are rows of it, and the file of rejects is derived from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import REJECT_FILE, SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.part import mark_complete, read_rejects
from nermill.worker.contracts.schema import REJECTS, part_schema
from nermill.worker.tagging.parts import Committed, commit


def part(*reasons: str | None, first: int = 0) -> pa.Table:
    """One row for each reason; None stands for a tagged document."""
    rows: list[dict[str, Any]] = [
        {
            "doc_index": first + n, "doc_id": f"d{first + n}", "n_chars": 3, "n_tokens": 3, "n_windows": 1,
            "status": "rejected" if reason else "ok", "entities": [],
            "reject_reason": reason, "reject_message": reason and f"{reason}: why",
        }
        for n, reason in enumerate(reasons)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, part_schema(keep_text=False, keep_fields=False))


def write(run: RunFolder, shard: int, table: pa.Table, attempts: int = 1) -> tuple[Committed, bool]:
    stats = {"tokens": 9, "computed_tokens": 12, "attempts": attempts}
    return commit(run, shard, table, metadata={"run_id": "r"}, stats=stats)


def rejects(run: RunFolder, shards: list[int]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for _, table in read_rejects(run, shards) for row in table.to_pylist()]


def test_a_late_worker_takes_nothing_from_the_winner(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert write(run, 0, part(None, "model_failure")) == (Committed(1, 1, 9, 12), True)
    assert write(run, 0, part(None, None)) == (Committed(1, 1, 9, 12), False), "its own result is dropped"
    assert rejects(run, [0]) == [(1, "d1", "model_failure", "model_failure: why", 1)]
    assert run.list() == [part_name(0)]
    assert write(run, 1, part("empty"), attempts=4) == (Committed(0, 1, 9, 12), True)
    assert write(run, 1, part("crashed_worker"), attempts=5)[1] is False
    assert rejects(run, [0, 1])[1] == (0, "d0", "empty", "empty: why", 4)


def test_a_complete_run_has_its_rejects_as_a_table(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for shard in range(40):
        write(run, shard, part(None, "empty" if shard % 9 == 8 else None, first=2 * shard))
    mark_complete(run, range(40))
    table = pq.read_table(run.path(REJECT_FILE))
    assert table.schema.equals(REJECTS)
    assert table["doc_index"].to_pylist() == [17, 35, 53, 71]
    assert set(table["reason"].to_pylist()) == {"empty"}
    assert run.exists(SUCCESS_FILE)


def test_a_run_without_rejects_has_no_table_of_them(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    write(run, 0, part(None))
    run.write(REJECT_FILE, b"of the run before its rejects were tried again")
    mark_complete(run, [0])
    assert not run.exists(REJECT_FILE)
    assert run.exists(SUCCESS_FILE)


def test_a_run_is_not_complete_before_its_rejects_are_written(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    write(run, 0, part("empty"))
    (tmp_path / "_rejects").touch()
    with pytest.raises(StoreError, match="put a folder in the place of that file"):
        mark_complete(run, [0])
    assert not run.exists(SUCCESS_FILE)


def test_a_mark_that_another_process_left_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    (tmp_path / SUCCESS_FILE).touch()
    mark_complete(RunFolder(str(tmp_path)), [])
    assert synced == [str(tmp_path)]


def test_rejects_of_a_compacted_part_have_the_attempts_of_their_shard(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    write(run, 0, part(None, "empty", "empty"))
    table = pq.read_table(run.path(part_name(0)))
    stats = json.dumps([
        {"documents": 2, "rejected": 1, "attempts": 1}, {"documents": 1, "rejected": 1, "attempts": 3},
    ])  # fmt: skip
    metadata = {**table.schema.metadata, b"nermill.stats": stats.encode()}
    pq.write_table(table.replace_schema_metadata(metadata), run.path(part_name(1)))
    assert [row[-1] for row in rejects(run, [1])] == [1, 3]


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more", None])
def test_a_damaged_part_is_named(tmp_path: Path, data: bytes | None) -> None:
    run = RunFolder(str(tmp_path))
    write(run, 0, part("empty"))
    run.write(part_name(0), run.read(part_name(0))[:-30] if data is None else data)
    with pytest.raises(StoreError, match=r"part-00000\.parquet: damaged part .*; remove it and run nermill resume"):
        rejects(run, [0])
