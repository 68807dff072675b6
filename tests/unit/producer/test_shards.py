"""Shards hold every document once, in order, and end before a limit is passed."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.producer.runs.shards import (
    ShardLimits,
    document_text,
    estimated_tokens,
    group_documents,
    kind_of,
    write_shards,
)
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.shard import read_documents, read_shard, shard_table

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
documents = st.lists(
    st.one_of(
        st.builds(lambda t: Document("a", text=t), texts),
        st.builds(lambda w: Document("b", words=tuple(w), gold_tags=("O",) * len(w)), st.lists(texts, min_size=1)),
        st.just(Document("c", fault=Fault("empty", "the text is empty"))),
    )
)


@given(documents, st.integers(1, 5), st.integers(1, 100), st.integers(1, 30))
def test_cut_keeps_order_and_limits(items, count, characters, tokens):
    groups = list(group_documents(items, ShardLimits(count, characters, tokens)))
    assert [d for group in groups for d in group] == items
    for group in groups:
        sizes = [document_text(d) for d in group]
        assert 1 <= len(group) <= count
        assert len(group) == 1 or sum(map(len, sizes)) <= characters
        assert len(group) == 1 or sum(map(estimated_tokens, sizes)) <= tokens
        assert len({kind_of(d) for d in group} - {None}) <= 1


def test_kept_fields_are_json_that_every_reader_takes():
    nested: dict[str, object] = {
        "nan": float("nan"), "in": [1.5, {"deep": [float("inf"), -float("inf")]}], "é": "\ud800é", "none": None,
        "when": datetime.date(2024, 2, 29), "price": Decimal("1.10"), "raw": b"x\xff",
        "big": 1 << 70, "pairs": [("a", 1)],
    }  # fmt: skip
    [kept] = shard_table([Document("1", text="t", fields=nested)])["fields"].to_pylist()
    assert json.loads(str(kept), parse_constant=pytest.fail) == {
        "nan": None, "in": [1.5, {"deep": [None, None]}], "é": "?é", "none": None, "when": "2024-02-29",
        "price": "1.10", "raw": "x�", "big": 1 << 70, "pairs": [["a", 1]],
    }  # fmt: skip


def test_shards_read_back_as_they_were(tmp_path):
    run = RunFolder(str(tmp_path / "run=x"))
    items = [
        Document("1", text="Ada \U0001f980\r\n"),
        Document("2", words=("a\u00a0b",), gold_tags=("B-PER",)),
        Document("3", text="t", fields={"n": 1}),
        Document("4", fault=Fault("not_utf8", "not UTF-8")),
    ]
    shards = list(write_shards(run, items, ShardLimits(documents=3)))
    assert [(s.index, s.first, s.documents) for s in shards] == [(0, 0, 1), (1, 1, 1), (2, 2, 2)]
    assert [d for s in shards for d in read_documents(read_shard(run, s.index, s.sha256))] == items
