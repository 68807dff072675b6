"""Conversion between Arrow tables and the pipeline: a shard's rows to documents, and predictions to rows of a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.labels import LabelChoice
from nermill.worker.contracts.plan import Options
from nermill.worker.contracts.schema import ENTITY, part_schema
from nermill.worker.tagging.decode import ModelLabels, Spans, Units, tag_numbers
from nermill.worker.tagging.tokens import Tokens

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TaggableDocuments:
    """The documents of a shard that can be tagged.

    Attributes:
        rows: Row of each document in the shard.
        tokenizable: The documents' texts, or their lists of words where ``split``.
        texts: The documents' texts; words joined by single spaces where ``split``.
        chars: Number of code points of every row of the shard, rejected rows included, int64, shape (rows,).
        split: Whether the shard's documents are lists of words. A shard holds documents of one kind.
    """

    rows: list[int]
    tokenizable: Sequence[str] | Sequence[list[str]]
    texts: Sequence[str]
    chars: Int
    split: bool


def taggable_documents(table: pa.Table, options: Options) -> tuple[TaggableDocuments, dict[int, Fault]]:
    """The documents of a shard that can be tagged, and the fault of each other one by row.

    Args:
        table: Documents, with the SHARD schema.
        options: ``max_chars`` is the length of the longest document that is tagged.
    """
    words: list[list[str] | None] = table["words"].to_pylist()
    split = any(row is not None for row in words)
    given: list[str | None] = table["text"].to_pylist()
    texts = [text if row is None else " ".join(row) for text, row in zip(given, words, strict=True)] if split else given
    faults = {
        row: Fault(reason, message or reason)
        for row, (reason, message) in enumerate(
            zip(table["fault_reason"].to_pylist(), table["fault_message"].to_pylist(), strict=True)
        )
        if reason is not None
    }
    chars = np.fromiter((len(text or "") for text in texts), np.int64, len(texts))
    for row, text in enumerate(texts):
        if row in faults:
            continue
        if text is None or not text.strip():
            faults[row] = Fault("empty", "the document has no text")
        elif chars[row] > options.max_chars:
            faults[row] = Fault(
                "too_large", f"{chars[row]} characters, the limit is {options.max_chars}; raise it with --max-chars"
            )
    rows = [row for row in range(len(texts)) if row not in faults]
    whole = [text for row in rows if (text := texts[row]) is not None]
    pieces = [words[row] or [] for row in rows] if split else whole
    return TaggableDocuments(rows, pieces, whole, chars, split), faults


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's predictions for the taggable documents of a shard.

    Attributes:
        tokens: The documents' tokens.
        windows: Number of windows of each document, int64, shape (documents,).
        units, spans: The predicted labels, and the entities that they form.
        labels: The labels' names in the output.
    """

    tokens: Tokens
    windows: Int
    units: Units
    spans: Spans
    labels: ModelLabels


def rename_gold_labels(table: pa.Table, choice: LabelChoice, changes: Counter[str]) -> pa.Table:
    """The shard with its gold tags mapped and left out as the run's options say.

    Args:
        table: Documents, with the SHARD schema.
        choice: The options.
        changes: Counts the entities that were mapped or left out; see ``contracts.labels``.
    """
    if not choice.map and not choice.only:
        return table
    gold: list[list[str] | None] = table["gold_tags"].to_pylist()
    chosen = [None if tags is None else choice.tags(tags, changes) for tags in gold]
    at = table.schema.get_field_index("gold_tags")
    return table.set_column(at, table.schema.field(at), pa.array(chosen, pa.list_(pa.string())))


def part_table(
    table: pa.Table,
    documents: TaggableDocuments,
    prediction: Prediction,
    faults: dict[int, Fault],
    options: Options,
    first: int,
) -> pa.Table:
    """The rows of a part, in the shard's order.

    Args:
        table: The shard.
        documents: Its taggable documents.
        prediction: The model's predictions for them.
        faults: Fault of each rejected row, by row.
        options: The run's options.
        first: ``doc_index`` of the first row.
    """
    count = table.num_rows
    row_of = np.array(documents.rows, np.int64)
    healthy = np.ones(count, bool)
    healthy[list(faults)] = False
    spans = prediction.spans  # documents on which the model failed have none
    columns = {
        "doc_index": pa.array(np.arange(first, first + count)),
        "doc_id": table["doc_id"],
        "n_chars": pa.array(documents.chars, pa.int32()),
        "n_tokens": pa.array(_by_row(prediction.tokens.counts, row_of, count), pa.int32()),
        "n_windows": pa.array(np.minimum(_by_row(prediction.windows, row_of, count), 32767), pa.int16()),
        "status": pa.array(np.where(healthy, "ok", "rejected"), pa.string()),
        "entities": _entities(documents, prediction, spans, row_of, count),
        "words": table["words"],
        "tags": _tags(documents, prediction, spans, healthy),
        "gold_tags": table["gold_tags"],
        "reject_reason": pa.array([faults[row].reason if row in faults else None for row in range(count)], pa.string()),
        "reject_message": pa.array(
            [faults[row].message if row in faults else None for row in range(count)], pa.string()
        ),
        "text": _text(table, documents),
        "fields": table["fields"],
    }
    schema = part_schema(keep_text=options.keep_text, keep_fields=options.keep_fields)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _by_row(values: Int, row_of: Int, count: int) -> Int:
    spread = np.zeros(count, np.int64)
    spread[row_of] = values
    return spread


def _entities(
    documents: TaggableDocuments, prediction: Prediction, spans: Spans, row_of: Int, count: int
) -> pa.Array[Any]:
    units, labels = prediction.units, prediction.labels
    start, end = (
        _word_extents(documents, units, spans) if documents.split else _token_extents(prediction.tokens, units, spans)
    )
    texts = [documents.texts[document][s:e] for document, s, e in zip(spans.document.tolist(), start, end, strict=True)]
    values = pa.StructArray.from_arrays(
        [
            pa.array(start, pa.int32()),
            pa.array(end, pa.int32()),
            pa.array(labels.names, pa.string()).take(spans.type - 1),
            pa.array(texts, pa.string()),
            pa.array(spans.score, pa.float32()),
        ],
        fields=list(ENTITY),
    )
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(row_of[spans.document], minlength=count), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _token_extents(tokens: Tokens, units: Units, spans: Spans) -> tuple[list[int], list[int]]:
    """First and past-the-last code point of each span, from the tokenizer's offsets."""
    return tokens.start[units.first[spans.first]].tolist(), tokens.end[units.last[spans.last]].tolist()


def _word_extents(documents: TaggableDocuments, units: Units, spans: Spans) -> tuple[list[int], list[int]]:
    """First and past-the-last code point of each span in the words joined by single spaces."""
    start, end = [], []
    previous, begins = -1, [0]
    first, last = units.word[spans.first].tolist(), units.word[spans.last].tolist()
    for document, a, b in zip(spans.document.tolist(), first, last, strict=True):
        if document != previous:
            previous = document
            begins = list(accumulate((len(word) + 1 for word in documents.tokenizable[document]), initial=0))
        start.append(begins[a])
        end.append(begins[b + 1] - 1)
    return start, end


def _tags(
    documents: TaggableDocuments, prediction: Prediction, spans: Spans, healthy: NDArray[np.bool_]
) -> pa.Array[Any]:
    """One IOB2 tag for each word; null for rejected rows and for texts. A word without tokens has the tag ``O``."""
    count, units = len(healthy), prediction.units
    if not documents.split:
        return pa.nulls(count, pa.list_(pa.string()))
    sizes = np.fromiter(map(len, documents.tokenizable), np.int64, len(documents.rows))
    begins = np.cumsum(sizes) - sizes
    numbers = np.zeros(int(sizes.sum()), np.int64)
    order = np.arange(len(units.word))[::-1]  # a word's first unit is written last, so its tag is kept
    numbers[(begins[units.document] + units.word)[order]] = tag_numbers(units, spans)[order]
    row_of = np.array(documents.rows, np.int64)
    kept = np.repeat(healthy[row_of], sizes)
    by_row = _by_row(sizes, row_of, count) * healthy
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(by_row)])
    values = pa.array(prediction.labels.tags, pa.string()).take(numbers[kept])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~healthy))


def _text(table: pa.Table, documents: TaggableDocuments) -> pa.Array[Any] | pa.ChunkedArray[Any]:
    if not documents.split:
        return table["text"]
    texts: list[str | None] = [None] * table.num_rows
    for row, text in zip(documents.rows, documents.texts, strict=True):
        texts[row] = text
    return pa.array(texts, pa.string())
