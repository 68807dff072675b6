"""``nermill publish``: a run's rows are in a Delta table once, whatever is repeated, killed or done by two at once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from nermill.worker.contracts.layout import RunFolder, part_name
from tests.texts import Made, make_run

deltalake = pytest.importorskip("deltalake")

DOCUMENTS: list[Made | None] = [
    ("Ada met Bob", [(0, 3, "PER"), (8, 11, "PER")]),
    None,
    ("no one", []),
    *[(f"Name{n} came", [(0, 5, "PER")]) for n in range(97)],
]
KILLS = 20


def publishing(run: RunFolder, table: Path | str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nermill.producer.cli", "publish", run.uri, str(table), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows_of(table: Path | str) -> pa.Table:
    return pa.table(deltalake.DeltaTable(str(table)).to_pyarrow_table())


def commits(table: Path | str, run_id: str = "made") -> list[int]:
    history = deltalake.DeltaTable(str(table)).history()
    return [commit["version"] for commit in history if commit.get("nermill.run_id") == run_id]


def test_documents_are_the_parts_rows_and_the_run(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=30)
    code, out, err = nermill("publish", run.uri, tmp_path / "table", "--json")
    assert (code, err) == (0, "")
    body = json.loads(out)
    assert (body["rows"], body["is_new"], body["version"], body["run_id"]) == (100, True, 1, "made")
    read = rows_of(tmp_path / "table").sort_by("doc_index")
    parts = pa.concat_tables(pq.read_table(run.path(part_name(n))) for n in range(4))
    assert read.select(parts.column_names).to_pylist() == parts.to_pylist()
    assert set(read["run"].to_pylist()) == {"made"}
    assert set(read["model"].to_pylist()) == {"stand-in"}


def test_entities_are_a_row_each(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=30)
    assert nermill("publish", run.uri, tmp_path / "table", "--layout", "entities")[0] == 0
    rows = rows_of(tmp_path / "table").sort_by([("doc_index", "ascending"), ("start", "ascending")]).to_pylist()
    assert len(rows) == 99
    expected = {
        "run": "made", "model": "stand-in", "doc_index": 0, "doc_id": "d0",
        "start": 8, "end": 11, "label": "PER", "text": "Bob", "score": pytest.approx(0.9),
    }  # fmt: skip
    assert rows[1] == expected


def test_other_readers_see_the_same_rows(nermill, tmp_path):
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=30)
    table = tmp_path / "table"
    assert nermill("publish", run.uri, table)[0] == 0
    expected = list(range(100))
    dataset = deltalake.DeltaTable(str(table)).to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    assert [row[0] for row in duckdb.sql("SELECT doc_index FROM dataset ORDER BY 1").fetchall()] == expected
    counted = duckdb.sql("SELECT e.text FROM dataset, UNNEST(entities) AS u(e) WHERE doc_index = 0").fetchall()
    assert sorted(counted) == [("Ada",), ("Bob",)]
    assert sorted(polars.read_delta(str(table))["doc_index"].to_list()) == expected


def test_a_repeated_call_adds_nothing(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS)
    table = tmp_path / "table"
    nermill("publish", run.uri, table)
    other = make_run(tmp_path / "out", DOCUMENTS[:7], run_id="other")
    assert nermill("publish", other.uri, table)[0] == 0
    code, out, _ = nermill("publish", run.uri, table, "--json")
    body = json.loads(out)
    assert (code, body["rows"], body["is_new"], body["version"]) == (0, 0, False, 1)
    assert "since version 1; nothing to do" in nermill("publish", run.uri, table)[1]
    assert rows_of(table).num_rows == 107
    assert (commits(table), commits(table, "other")) == ([1], [2])


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_call_killed_at_any_moment_adds_the_rows_once(tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=5)
    table = tmp_path / "table"
    begun = time.monotonic()
    publishing(run, tmp_path / "other").communicate()
    lasts = time.monotonic() - begun
    draw, killed = random.Random(20), 0
    for moment in sorted(draw.uniform(0.1, 1.0) for _ in range(KILLS)):  # the early ones first: none of them commits
        process = publishing(run, table)
        time.sleep(lasts * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    process = publishing(run, table)
    _, err = process.communicate()
    assert (process.returncode, killed >= KILLS // 2) == (0, True), err
    assert rows_of(table).sort_by("doc_index")["doc_index"].to_pylist() == list(range(100))
    assert len(commits(table)) == 1


@pytest.mark.parametrize("exists", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_at_once_add_the_rows_once(tmp_path, exists):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=5)
    table = tmp_path / "table"
    if exists:
        before = publishing(make_run(tmp_path / "out", DOCUMENTS[:3], run_id="before"), table)
        before.communicate()
    both = [publishing(run, table) for _ in range(3)]
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], answers
    assert sorted(json.loads(out)["rows"] for out, _ in answers) == [0, 0, 100]
    assert rows_of(table).num_rows == 100 + 3 * exists
    assert len(commits(table)) == 1


def test_a_commit_that_wins_between_look_and_commit_leaves_ours_out(monkeypatch, tmp_path):
    """Both have seen a table without the run; Delta's conflict check refuses the second."""
    from nermill.producer.entities.publish import publish
    from nermill.producer.runs.result import open_complete

    run, plan = open_complete(make_run(tmp_path / "out", DOCUMENTS).uri)
    table = str(tmp_path / "table")
    write, calls = deltalake.write_deltalake, []

    def second_first(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            assert publish(run, plan, table).is_new
        write(*arguments, **options)

    monkeypatch.setattr(deltalake, "write_deltalake", second_first)
    assert not publish(run, plan, table).is_new
    assert (rows_of(table).num_rows, len(commits(table)), len(calls)) == (100, 1, 2)


def test_columns_are_added_when_asked_and_missing_ones_are_null(nermill, tmp_path):
    table = tmp_path / "table"
    lean = make_run(tmp_path / "out", DOCUMENTS[:3], run_id="lean", keep_text=False)
    full = make_run(tmp_path / "out", DOCUMENTS[:3], run_id="full")
    more = make_run(tmp_path / "out", DOCUMENTS[:3], run_id="more", keep_text=False)
    assert nermill("publish", lean.uri, table)[0] == 0
    code, _, err = nermill("publish", full.uri, table)
    assert code == 2
    assert "it has no column text" in err
    assert commits(table, "full") == []
    assert nermill("publish", full.uri, table, "--merge-schema")[0] == 0
    assert nermill("publish", more.uri, table)[0] == 0
    texts = {(row["run"], row["doc_index"]): row["text"] for row in rows_of(table).to_pylist()}
    assert [texts[name, 0] for name in ("lean", "full", "more")] == [None, "Ada met Bob", None]


def refused(nermill, *arguments: object, code: int = 2) -> str:
    answer, out, err = nermill("publish", *arguments)
    assert (answer, out, err.count("\n")) == (code, "", 1), err
    return err


def test_a_wrong_input_is_one_line_and_writes_nothing(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS)
    partial = make_run(tmp_path / "out", DOCUMENTS, run_id="partial", per_shard=50, missing=1)
    table = tmp_path / "table"
    assert "not complete" in refused(nermill, partial.uri, table)
    assert "no run here" in refused(nermill, tmp_path / "nowhere", table)
    assert "--layout 'rows'" in refused(nermill, run.uri, table, "--layout", "rows")
    assert not table.exists()
    assert "no Delta table, and not empty" in refused(nermill, run.uri, run.uri)
    (tmp_path / "file").write_text("x")
    assert "no Delta table, and not empty" in refused(nermill, run.uri, tmp_path / "file")
    assert "nowhere://x" in refused(nermill, run.uri, "nowhere://x/table", code=2)
    deltalake.write_deltalake(str(table), pa.table({"doc_id": [1]}))
    assert "its column doc_id is int64, the run's is string" in refused(nermill, run.uri, table)
    assert "no column run" in refused(nermill, run.uri, foreign := table_with(tmp_path, "price"))
    assert [deltalake.DeltaTable(str(path)).version() for path in (table, foreign)] == [0, 0]


def table_with(folder: Path, column: str) -> Path:
    deltalake.write_deltalake(str(folder / column), pa.table({column: [1]}))
    return folder / column


def test_a_damaged_part_adds_no_row(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS, per_shard=30)
    whole = Path(run.path(part_name(3))).read_bytes()
    Path(run.path(part_name(3))).write_bytes(whole[:-20])
    err = refused(nermill, run.uri, tmp_path / "table", code=1)
    assert "part-00003.parquet: damaged part" in err
    assert (rows_of(tmp_path / "table").num_rows, commits(tmp_path / "table")) == (0, [])
    Path(run.path(part_name(3))).write_bytes(whole)
    assert nermill("publish", run.uri, tmp_path / "table")[0] == 0
    assert rows_of(tmp_path / "table").num_rows == 100


def test_a_table_that_cannot_be_written_is_one_line(nermill, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS)
    (tmp_path / "file").write_text("x")
    assert "no row was added" in refused(nermill, run.uri, tmp_path / "file" / "table", code=1)


def test_without_deltalake_it_says_what_to_install(nermill, monkeypatch, tmp_path):
    run = make_run(tmp_path / "out", DOCUMENTS)
    monkeypatch.setitem(sys.modules, "deltalake", None)
    assert "pip install 'nermill[delta]'" in refused(nermill, run.uri, tmp_path / "table")
