"""Documents as they travel through the broker: nothing changes on the way, nothing else is taken for them."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64encode
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nermill.worker.contracts.by_value import MAX_UNPACKED_BYTES, TooLargeError, pack, unpack
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.shard import shard_table

text = st.text(st.characters(codec="utf-8"), max_size=30)
fields = st.none() | st.dictionaries(text, st.integers() | text | st.lists(st.floats(allow_nan=True)), max_size=3)
texts = st.builds(Document, id=text, text=text, fields=fields)
faults = st.builds(Document, id=text, fault=st.builds(Fault, st.sampled_from(["empty", "malformed"]), text))
pairs = st.lists(st.tuples(text, st.sampled_from(["O", "B-PER"])), max_size=5)
words = st.builds(
    lambda name, pair: Document(name, words=tuple(w for w, _ in pair), gold_tags=tuple(t for _, t in pair)), text, pairs
)


@settings(deadline=None)
@given(st.lists(texts | faults, max_size=8) | st.lists(words | faults, max_size=8))
def test_documents_arrive_as_they_were_sent(documents: list[Document]) -> None:
    table = shard_table(documents)
    assert unpack(*pack(table)).equals(table)


def test_documents_above_a_shards_size_are_not_packed() -> None:
    noise = b64encode(os.urandom(1_000_000)).decode()
    assert pack(shard_table([Document("small", text=noise)]))
    with pytest.raises(TooLargeError, match="when compressed; 1048576 is the limit of a shard by value"):
        pack(shard_table([Document("large", text=noise * 2 + noise[::-1])]))
    with pytest.raises(TooLargeError, match="16777216 is the limit"):
        pack(shard_table([Document("long", text="a" * MAX_UNPACKED_BYTES)]))


GOOD: dict[str, list[Any]] = {
    "doc_id": ["a", "b"],
    "text": ["Ada", "Charles"],
    "words": [None, None],
    "gold_tags": [None, None],
    "fields": [None, None],
    "fault_reason": [None, None],
    "fault_message": [None, None],
}


def packed(columns: object) -> tuple[bytes, str]:
    data = zstandard.compress(json.dumps(columns).encode())
    return data, hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"doc_id": ["a", None]}, "with an id"),
        ({"doc_id": ["a"]}, "no documents"),
        ({"doc_id": [1, 2]}, "no documents"),
        ({"text": ["Ada", None]}, "not one text"),
        ({"words": [["Ada"], None]}, "not one text"),
        ({"text": ["Ada", {"a": 1}]}, "no documents"),
        ({"text": "Ad"}, "other columns"),
        ({"text": [None, "Charles"], "words": [["Ada"], None]}, "texts and lists of words"),
        ({"text": [None, None], "words": [["Ada", None], ["x"]]}, "do not fit"),
        ({"text": [None, None], "words": [["Ada"], ["x"]], "gold_tags": [["O", "O"], None]}, "do not fit"),
        ({"gold_tags": [["O"], None]}, "do not fit"),
        ({"more": [None, None]}, "other columns"),
    ],
)
def test_other_columns_are_refused(change: dict[str, Any], told: str) -> None:
    assert unpack(*packed(GOOD)).num_rows == 2
    with pytest.raises(ValueError, match=told):
        unpack(*packed({**GOOD, **change}))


@pytest.mark.parametrize(
    "data",
    [b"", b"x", zstandard.compress(b"{"), zstandard.compress(b"\xff"), zstandard.compress(b"[" * 200_000), b"[]"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"documents|columns|Expecting"):
        unpack(data, hashlib.sha256(data).hexdigest())


def test_documents_with_another_hash_are_refused() -> None:
    data, _ = packed(GOOD)
    with pytest.raises(ValueError, match="sha256"):
        unpack(data, "0" * 64)


def test_what_unpacks_to_gigabytes_is_not_unpacked() -> None:
    compressor = zstandard.ZstdCompressor()
    data = compressor.compress(b" " * (40 * MAX_UNPACKED_BYTES))
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="unpack to more than"):
        unpack(data, hashlib.sha256(data).hexdigest())
