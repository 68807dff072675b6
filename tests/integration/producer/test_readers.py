"""The table opened with the tools that people have: counts, entities per label, a join back, the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nermill.producer.runs import run as runs
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.shards import ShardLimits
from nermill.worker.contracts.part import mark_complete
from nermill.worker.evaluation import evaluate, write_report
from tests.stand_in import next_claim
from tests.unit.evaluation.runs import Doc, make_run

from .conftest import POISON

TEXTS = {"a": "Ada met Bob", "b": "no one", "c": POISON, "d": "Carol \U0001f980", "e": ""}
PEOPLE = 3


@pytest.fixture(scope="module")
def run(broker_url, tmp_path_factory) -> str:
    from nermill.worker.contracts.broker import redis_client
    from nermill.worker.contracts.ledger import Ledger

    from .conftest import ARTIFACT, tag

    folder = tmp_path_factory.mktemp("readers")
    corpus = folder / "in.jsonl"
    corpus.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in TEXTS.items()))
    folder, plan = make_plan(Request((str(corpus),), str(folder / "out"), limits=ShardLimits(documents=2)))
    queue = Queue(broker_url)
    runs.send(folder, plan, queue)
    ledger = Ledger(redis_client(broker_url))
    while claim := next_claim(ledger, ARTIFACT):
        tag(claim, ledger)
    assert runs.wait(folder, plan, queue).rejected == 2
    return folder.uri


def test_duckdb(run):
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as database:
        parts = f"read_parquet('{run}/*.parquet')"
        assert database.sql(f"SELECT count(*) FROM {parts}").fetchall() == [(len(TEXTS),)]
        labels = f"SELECT e.label, count(*) FROM {parts}, UNNEST(entities) AS u(e) GROUP BY 1"
        assert database.sql(labels).fetchall() == [("PER", PEOPLE)]
        inputs = f"read_json('{Path(run).parents[1]}/in.jsonl')"
        join = f"{parts} p JOIN {inputs} i ON i.id = p.doc_id, UNNEST(p.entities) AS u(e)"
        joined = f"SELECT i.text[e.start + 1 : e.end] = e.text FROM {join}"
        assert database.sql(joined).fetchall() == [(True,)] * PEOPLE
        keys = database.sql(f"SELECT decode(key) FROM parquet_kv_metadata('{run}/part-00000.parquet')").fetchall()
        assert ("nermill.run_id",) in keys


def test_polars(run):
    polars = pytest.importorskip("polars")
    table = polars.scan_parquet(f"{run}/part-*.parquet").collect()
    assert table.height == len(TEXTS)
    people = table.explode("entities").unnest("entities").drop_nulls("label")
    assert people.group_by("label").len().rows() == [("PER", PEOPLE)]
    inputs = polars.DataFrame({"doc_id": list(TEXTS), "input": list(TEXTS.values())})
    joined = people.join(inputs, on="doc_id")
    assert [row["input"][row["start"] : row["end"]] for row in joined.to_dicts()] == joined["text"].to_list()
    assert polars.read_parquet_metadata(f"{run}/part-00000.parquet")["nermill.run_id"] == run_id(run)


def test_pandas(run):
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(run)
    assert table["doc_id"].tolist() == list(TEXTS)
    people = table.explode("entities").dropna(subset="entities")
    assert people["entities"].map(lambda entity: entity["label"]).value_counts().to_dict() == {"PER": PEOPLE}
    inputs = pandas.DataFrame({"doc_id": list(TEXTS), "input": list(TEXTS.values())})
    joined = people.merge(inputs, on="doc_id")
    assert len(joined) == PEOPLE
    assert all(text[e["start"] : e["end"]] == e["text"] for text, e in zip(joined["input"], joined["entities"]))  # noqa: B905


def test_pyarrow_dataset(run):
    from pyarrow import compute, dataset

    from nermill.worker.contracts.schema import metadata_of

    parts = dataset.dataset(run)
    assert parts.count_rows() == len(TEXTS)
    assert parts.to_table(filter=dataset.field("status") == "rejected")["doc_id"].to_pylist() == ["c", "e"]
    table = parts.to_table()
    entities = table["entities"].combine_chunks()
    labels = compute.value_counts(entities.flatten().field("label")).to_pylist()
    assert labels == [{"values": "PER", "counts": PEOPLE}]
    owners = table["doc_id"].take(compute.list_parent_indices(entities)).to_pylist()
    found = zip(owners, entities.flatten().to_pylist(), strict=True)
    assert all(TEXTS[owner][e["start"] : e["end"]] == e["text"] for owner, e in found)
    metadata = metadata_of(parts.schema)
    assert metadata["run_id"] == run_id(run)
    assert metadata["offset_unit"] == "unicode_code_point"


def test_datasets(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(run, split="train", cache_dir=str(tmp_path), keep_in_memory=True)
    assert table["doc_id"][:] == list(TEXTS)
    found = [(row["doc_id"], entity) for row in table for entity in row["entities"]]
    assert [entity["label"] for _, entity in found] == ["PER"] * PEOPLE
    assert all(TEXTS[owner][e["start"] : e["end"]] == e["text"] for owner, e in found)


@pytest.mark.slow
def test_datasets_reads_a_run_of_one_part_that_was_evaluated(tmp_path):
    """More of its files are JSON than Parquet, and datasets goes by the majority unless it is told."""
    datasets = pytest.importorskip("datasets")
    docs = [Doc(["Ada", "met", "Bob"], ["B-PER", "O", "B-PER"], ["B-PER", "O", "B-PER"])]
    made = make_run(tmp_path, docs)
    write_report(made, evaluate(made))
    mark_complete(made, [0])
    table = datasets.load_dataset(made.uri, split="train", cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    assert table["tags"][:] == [["B-PER", "O", "B-PER"]]


@pytest.fixture(scope="module")
def runs_of(run, broker_url) -> str:
    """The folder around two runs with all their files."""
    out = Path(run).parent
    made = make_run(out, [Doc(["Ada"], ["B-PER"], ["B-PER"])] * 3)
    write_report(made, evaluate(made))
    mark_complete(made, [0])
    return str(out)


def test_the_folder_around_runs_is_one_table_with_a_column_run(run, runs_of):
    pandas, polars, duckdb = (pytest.importorskip(name) for name in ("pandas", "polars", "duckdb"))
    from pyarrow import dataset

    expected = {run_id(run): len(TEXTS), "made": 3}
    assert pandas.read_parquet(runs_of)["run"].value_counts().to_dict() == expected
    table = dataset.dataset(runs_of, partitioning="hive").to_table(columns=["run"])
    assert {row["values"]: row["counts"] for row in table["run"].value_counts().to_pylist()} == expected
    frame = polars.scan_parquet(f"{runs_of}/run=*/part-*.parquet", hive_partitioning=True).collect()
    assert dict(frame["run"].value_counts().rows()) == expected
    found = duckdb.sql(f"SELECT run, count(*) FROM read_parquet('{runs_of}/run=*/*.parquet') GROUP BY 1").fetchall()
    assert dict(found) == expected


def run_id(run: str) -> str:
    return json.loads((Path(run) / "_plan.json").read_text())["run_id"]


def test_seqeval_reads_what_show_writes(broker_url, tmp_path):
    """CoNLL in, CoNLL out: seqeval's scores of the two columns are those of the report."""
    f1_score = pytest.importorskip("seqeval.metrics").f1_score

    from nermill.producer.entities.show import conll_lines
    from nermill.worker.contracts.broker import redis_client
    from nermill.worker.contracts.ledger import Ledger

    from .conftest import ARTIFACT, tag

    gold = "Ada B-PER\nmet O\nBob B-PER\n\nin O\nBonn B-LOC\n"
    corpus = tmp_path / "in.conll"
    corpus.write_text(gold)
    folder, plan = make_plan(Request((str(corpus),), str(tmp_path / "out")))
    queue = Queue(broker_url)
    runs.send(folder, plan, queue)
    ledger = Ledger(redis_client(broker_url))
    while claim := next_claim(ledger, ARTIFACT):
        tag(claim, ledger)
    written = "\n".join(conll_lines(folder, plan, None))

    def tags(text: str) -> list[list[str]]:
        return [[line.split()[-1] for line in block.splitlines()] for block in text.strip().split("\n\n")]

    assert [len(sentence) for sentence in tags(written)] == [3, 2]
    assert f1_score(tags(gold), tags(written)) == pytest.approx(evaluate(folder)["f1"])
