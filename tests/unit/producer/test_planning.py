"""The same request finds its run again; an invalid request writes nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from nermill.producer.runs.planning import Request, make_plan, nothing_half_written
from nermill.producer.runs.recovery import BEFORE, beside
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.sources import ReadOptions, reading
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.plan import Options, read_plan


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"Ada {n}"}) + "\n" for n in range(10)))
    return Request((str(path),), str(tmp_path / "deep" / "out"), limits=ShardLimits(documents=4))


def test_the_plan_is_enough_to_know_the_run(request_):
    run, plan = make_plan(request_)
    assert read_plan(run) == plan
    assert (plan.documents, [s.documents for s in plan.shards], run.shards()) == (10, [4, 4, 2], {0, 1, 2})
    assert (plan.inputs[0].documents, plan.inputs[0].format, len(plan.inputs[0].sha256)) == (10, "jsonl", 64)
    assert (plan.has_gold, plan.unit) == (False, "document")


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv.gz", "in.parquet"])
def test_the_reading_says_how_far_it_is(request_, tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "REPORT_SECONDS", 0.0)
    path = tmp_path / name
    texts = [f"Ada {n} {hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(20_000)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=5000)
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress("\n".join(["text", *texts]).encode()))
    seen: list[reading.ReadProgress] = []
    make_plan(replace(request_, inputs=(str(tmp_path / "in.jsonl"), str(path)), limits=ShardLimits()), seen.append)
    total = sum(file.stat().st_size for file in {tmp_path / "in.jsonl", path})
    assert {far.total_bytes for far in seen} == {total}
    assert (seen[-1].bytes, seen[-1].documents) == (total, 10 if name == "in.jsonl" else 20_010)
    assert name == "in.jsonl" or len({far.bytes for far in seen}) > 2  # it moves within a file, packed or not


def test_the_same_request_is_the_same_run_and_another_is_another(request_):
    run, plan = make_plan(request_)
    before = os.stat(run.path("_plan.json")).st_mtime_ns
    assert make_plan(request_) == (run, plan)
    assert os.stat(run.path("_plan.json")).st_mtime_ns == before
    others = [
        replace(request_, options=Options(aggregation="max")),
        replace(request_, limits=ShardLimits(documents=5)),
        replace(request_, read=ReadOptions(keep_fields=True)),
    ]
    assert len({plan.run_id, *(make_plan(other)[1].run_id for other in others)}) == 4


def test_planning_again_mends_what_is_gone_or_damaged_and_has_no_part(request_):
    run, plan = make_plan(request_)
    whole = [run.read(run.shard_file(shard)) for shard in range(3)]
    run.write(part_name(0), b"")
    for shard in range(3):
        run.write(run.shard_file(shard), b"damaged")
    run.remove(run.shard_file(2))
    assert make_plan(request_) == (run, plan)
    assert [run.read(run.shard_file(shard)) for shard in range(3)] == [b"damaged", *whole[1:]]


@pytest.mark.parametrize("others", [(5, 5), (4, 4), (4, 4, 1, 1), (3, 4, 3)])
def test_a_plan_with_other_cuts_is_not_mended(request_, others):
    run, plan = make_plan(request_)
    shards = tuple(replace(plan.shards[0], index=index, documents=count) for index, count in enumerate(others))
    replace(plan, shards=shards).write(run)
    run.remove(run.shard_file(1))
    with pytest.raises(UsageError, match=r"planned by another version of nermill.*; name another --out[^\n]*$"):
        make_plan(request_)


def test_a_run_that_a_compaction_left_beside_its_place_is_found(request_):
    run, plan = make_plan(request_)
    run.write(part_name(0), b"")
    os.rename(run.uri, beside(run, BEFORE))
    assert make_plan(request_) == (run, plan)
    assert run.committed() == {0}


def test_shards_of_a_planning_that_was_killed_are_replaced(request_):
    run, plan = make_plan(request_)
    run.remove("_plan.json")
    run.write(run.shard_file(9), b"stale")
    assert make_plan(request_)[1].shards == plan.shards
    assert run.shards() == {0, 1, 2}


@pytest.mark.parametrize("bad", ['{"text": ', '{"body": 1}'])
def test_nothing_is_left_of_a_wrong_input(request_, tmp_path, bad):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"texts": "Ada"}\n' * 300 + bad + "\n")
    with pytest.raises(UsageError):
        make_plan(replace(request_, inputs=(str(path),)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "in.jsonl"]


def test_what_was_there_before_stays(request_, tmp_path):
    run, _ = make_plan(request_)
    (tmp_path / "bad.jsonl").write_text('{"text": "Ada"}\n{')
    with pytest.raises(UsageError):
        make_plan(replace(request_, inputs=(str(tmp_path / "bad.jsonl"),), read=ReadOptions(on_error="fail")))
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == [Path(run.uri).name]


def test_nothing_is_left_on_a_store_either(request_, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "Ada"}\n' * 10 + "{")
    bad = replace(request_, inputs=(str(tmp_path / "bad.jsonl"),), read=ReadOptions(on_error="fail"))
    with pytest.raises(UsageError):
        make_plan(replace(bad, out="memory://store/bad"))
    import fsspec

    fs = fsspec.filesystem("memory")
    assert not fs.exists("/store/bad") or fs.find("/store/bad") == []


def test_a_run_that_somebody_else_planned_meanwhile_stays(request_):
    run, _ = make_plan(request_)
    with pytest.raises(KeyboardInterrupt), nothing_half_written(run):
        raise KeyboardInterrupt
    assert run.shards() == {0, 1, 2}


def test_outputs_that_cannot_be(request_, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be a folder"):
        make_plan(replace(request_, out=str(tmp_path / "file" / "out")))
    with pytest.raises(UsageError, match="Protocol not known"):
        make_plan(replace(request_, out="nobody://out"))
    run, _ = make_plan(request_)
    with pytest.raises(UsageError, match="a run's folder itself"):
        make_plan(replace(request_, out=run.uri))


def test_a_full_disk_leaves_nothing(request_, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> bool:
        raise StoreError("No space left on device")

    monkeypatch.setattr(RunFolder, "write", refuse)
    with pytest.raises(StoreError):
        make_plan(request_)
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fails_while_it_is_cleaned_does_not_hide_why(request_, monkeypatch):
    def refuse(run: RunFolder, *_: object, **__: object) -> bool:
        Path(run.uri).parent.mkdir(parents=True)
        raise StoreError("No space left on device")

    def fail(_: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RunFolder, "write", refuse)
    monkeypatch.setattr("nermill.producer.runs.planning.os.rmdir", fail)
    with pytest.raises(StoreError, match="No space left"):
        make_plan(request_)
