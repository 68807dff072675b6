"""Whichever format carries a text, the same entities come out; CoNLL that went in comes out as CoNLL."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq
from tokenizers import Tokenizer

from nermill.producer.entities.show import conll_lines, read_rows
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.sources import ReadOptions
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.shard import read_shard
from nermill.worker.tagging import parts
from nermill.worker.tagging.pipeline import Pipeline
from tests.doubles.engine import HashEngine, manifest

words = st.text("abcXYZéßñøΩжЖ9", min_size=1, max_size=8)
documents = st.lists(st.lists(words, min_size=1, max_size=8), min_size=1, max_size=4)
sparing = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    made = Pipeline(HashEngine(manifest()), tokenizer)
    yield made
    made.close()


def tagged(pipeline: Pipeline, request: Request) -> tuple[RunFolder, Plan]:
    """A run whose parts are written as a worker writes them."""
    shutil.rmtree(request.out, ignore_errors=True)
    run, plan = make_plan(request)
    for shard in plan.shards:
        made = pipeline.annotate(read_shard(run, shard.index, shard.sha256), plan.options, shard.first)
        parts.commit(run, shard.index, made.part, metadata={}, stats=asdict(made.stats))
    return run, plan


def four_columns(document: list[str]) -> str:
    return "".join(f"{word} NN I-NP O\n" for word in document)


@sparing
@given(documents)
@pytest.mark.slow
def test_every_format_ends_in_the_same_entities(tmp_path: Path, pipeline: Pipeline, written: list[list[str]]) -> None:
    texts = [" ".join(document) for document in written]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    contents = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
        "d.txt": "\n".join(texts).encode(),
        "e.conll": "\n".join("".join(f"{word}\tO\n" for word in document) for document in written).encode(),
        "f.conll": ("-DOCSTART- -X- -X- O\r\n\r\n" + "\n".join(map(four_columns, written))).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"text": texts}), tmp_path / "g.parquet")
    inputs = tuple(str(tmp_path / name) for name in [*contents, "g.parquet"])
    request = Request(inputs, str(tmp_path / "out"), read=ReadOptions(lines=True), limits=ShardLimits(documents=3))
    run, plan = tagged(pipeline, request)
    assert [entry.format for entry in plan.inputs] == ["jsonl", "jsonl", "jsonl", "text", "conll", "conll", "parquet"]
    rows = [shown.row for shown in read_rows(run, plan, None)]
    first = [row["entities"] for row in rows[: len(texts)]]
    assert [row["entities"] for row in rows] == first * len(inputs)
    assert all(
        text[e["start"] : e["end"]] == e["text"] for text, found in zip(texts, first, strict=True) for e in found
    )


@sparing
@given(documents)
@pytest.mark.slow
def test_conll_comes_out_as_conll_that_seqeval_reads(
    tmp_path: Path, pipeline: Pipeline, written: list[list[str]]
) -> None:
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    (tmp_path / "in.conll").write_text("\n".join(map(four_columns, written)), "utf-8")
    run, plan = tagged(pipeline, Request((str(tmp_path / "in.conll"),), str(tmp_path / "out")))
    lines = [line.split() for line in conll_lines(run, plan, None)]
    sentences = [list(group) for is_sentence, group in groupby(lines, bool) if is_sentence]
    assert [[word for word, _ in sentence] for sentence in sentences] == written
    for sentence, shown in zip(sentences, read_rows(run, plan, None), strict=True):
        assert get_entities([tag for _, tag in sentence]) == list(word_spans(written, shown.row))
    # what was written is an input again, and its gold tags are the tags
    (tmp_path / "out.conll").write_text("\n".join(conll_lines(run, plan, None)), "utf-8")
    _, again = tagged(pipeline, Request((str(tmp_path / "out.conll"),), str(tmp_path / "out")))
    assert (again.documents, again.has_gold) == (len(written), True)


def word_spans(written: list[list[str]], row: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """A row's entities as (label, first word, last word)."""
    starts, ends, at = {}, {}, 0
    for number, word in enumerate(written[row["doc_index"]]):
        starts[at], ends[at + len(word)] = number, number
        at += len(word) + 1
    for entity in row["entities"]:
        yield entity["label"], starts[entity["start"]], ends[entity["end"]]
