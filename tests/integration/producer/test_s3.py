"""A run on an S3 store (moto's server on loopback): killed, resumed, compacted, read; the same table as on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from nermill.producer.entities.show import read_rows
from nermill.producer.runs import run as runs
from nermill.producer.runs.compact import ASIDE, compact
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.stream import Stream
from nermill.producer.sources import ReadOptions
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder
from nermill.worker.contracts.plan import read_plan
from nermill.worker.evaluation import evaluate
from tests.harness import table_of
from tests.texts import make_run

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    import fsspec
    import s3fs

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_a_run_on_s3_whose_worker_is_killed_is_the_run_on_disk(bucket, fleet, tmp_path):
    corpus = tmp_path / "in.conll"
    corpus.write_text("".join(f"Ada{n} B-PER\nmet O\nBob I-PER\n\n" for n in range(60)))
    limits = ShardLimits(documents=3)
    roots = {"NERMILL_ALLOWED_ROOTS": f"{bucket}/deep,{fleet.out}"}
    tables, scores = [], []
    for out in (f"{bucket}/deep", str(fleet.out)):
        run, plan = make_plan(Request((str(corpus),), out, limits=limits))
        runs.send(run, plan, fleet.queue())
        if not fleet.workers:
            doomed = fleet.worker(FAULT_BATCH_SECONDS="0.2", **roots)
            fleet.until(run.committed, 40)
            doomed.kill()
            assert len(run.committed()) < len(plan.shards)
            fleet.worker(**roots)
        plan = runs.resume(run, plan, fleet.queue())
        assert fleet.wait(run, plan).state == "complete"
        assert run.exists(SUCCESS_FILE)
        scores.append(evaluate(run)["strict"])
        compacted = compact(run, plan)
        assert (len(plan.shards), len(compacted.shards), len(run.committed())) == (20, 1, 1)
        assert RunFolder(f"{run.uri}/{ASIDE}").list() == []
        assert [shown.row["doc_id"] for shown in read_rows(run, compacted, 2)] == [f"{corpus}:1", f"{corpus}:5"]
        tables.append(table_of(run, compacted))
        assert make_plan(Request((str(corpus),), out, limits=limits)) == (run, compacted)
    assert tables[0] == tables[1]
    assert scores[0] == scores[1]
    assert tables[0]["doc_index"].to_pylist() == list(range(60))


def test_inputs_are_read_from_s3(bucket, broker, serving, tmp_path):
    import fsspec

    with fsspec.open(f"{bucket}/in/a.jsonl", "wb") as stream:
        stream.write(b'{"text": "Ada"}\n')
    run, plan = make_plan(Request((f"{bucket}/in/*.jsonl",), str(tmp_path)))
    assert [(entry.uri, entry.documents) for entry in plan.inputs] == [(f"{bucket}/in/a.jsonl", 1)]
    assert run.shards() == {0}


@pytest.mark.slow
def test_a_stream_goes_to_s3(bucket, broker, serving):
    queue = Queue(broker)
    stream = Stream(bucket, queue, linger=0.05)
    with serving():
        stream.add(Document("a", text="Ada"))
        plan = stream.close()
        assert runs.wait(stream.run, plan, queue).ok == 1
    assert read_plan(stream.run) == plan


def test_a_wrong_input_leaves_no_object(bucket, tmp_path):
    import fsspec

    corpus = tmp_path / "in.jsonl"
    corpus.write_text(json.dumps({"text": "Ada"}) + "\n{")
    with pytest.raises(UsageError):
        make_plan(Request((str(corpus),), f"{bucket}/out", read=ReadOptions(on_error="fail")))
    assert fsspec.filesystem("s3").find(f"{bucket}/out") == []


def test_a_bucket_that_is_not_there_is_one_line(bucket, tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text(json.dumps({"text": "Ada"}))
    with pytest.raises((StoreError, UsageError)) as caught:
        make_plan(Request((str(corpus),), "s3://nowhere/out"))
    assert "nowhere" in str(caught.value)
    assert "\n" not in str(caught.value)


READ_DELTA = """
import json, sys, deltalake
table = deltalake.DeltaTable(sys.argv[1], storage_options={"allow_http": "true"})
commits = [commit.get("nermill.run_id") for commit in table.history()]
print(json.dumps([sorted(table.to_pyarrow_table()["doc_index"].to_pylist()), commits]))
"""


@pytest.mark.slow
def test_a_run_on_s3_is_published_once_by_two_at_once_and_by_a_third(bucket):
    """All in processes of their own: deltalake holds the interpreter's lock while it waits for the store."""
    pytest.importorskip("deltalake")
    run = make_run(f"{bucket}/out", [("Ada met Bob", [(0, 3, "PER")])] * 60, per_shard=10)
    table = f"{bucket}/lake/entities"
    command = [sys.executable, "-m", "nermill.producer.cli", "publish", run.uri]
    both = [started(*command, table, "--json") for _ in range(2)]
    answers = [process.communicate(timeout=100) for process in both]
    answers.append(started(*command, table, "--json").communicate(timeout=100))
    assert sorted(json.loads(out)["rows"] for out, _ in answers) == [0, 0, 60], answers
    out, err = started(sys.executable, "-c", READ_DELTA, table).communicate(timeout=100)
    rows, commits = json.loads(out or err)
    assert (rows, commits.count("made")) == (list(range(60)), 1)
    for place, code, said in (
        (run.uri, 2, b"no Delta table, and not empty"),
        ("s3://nowhere/table", 1, b"no row was added"),
    ):
        process = started(*command, place)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out, err.count(b"\n"), said in err) == (code, b"", 1, True), err


def started(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
