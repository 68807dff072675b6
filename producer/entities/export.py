"""Exports a complete run for annotation tools: as CoNLL columns, JSON lines, or CSV with one row an entity."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, get_args

from nermill.producer.entities.show import TaggedDocument, read_rows
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.tags import OUTSIDE

Format = Literal["conll", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
CSV_COLUMNS = ("doc_index", "id", "start", "end", "label", "text", "score")

_DOCSTART = "-DOCSTART-"
_SPACE = frozenset(" \t\r\n")
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # the word of a rejected document, whose words are not known


def export_lines(run: RunFolder, plan: Plan, form: Format) -> Iterator[str]:
    """The run as lines, without line ends; one document at a time is in memory.

    ``conll``: word and IOB2 tag, an empty line after each document, ``-DOCSTART-`` before it where documents are more
    than a sentence. Texts are split at white space, at punctuation and at the edges of entities. Rejected documents are
    included with ``O``, so the file has all documents of the run in their order. A corrected file is gold for
    ``evaluate --gold`` where the input came as words; that of texts is a new input.

    ``jsonl``: ``id``, ``text``, ``label`` (``[start, end, label]``, as doccano reads) and ``spans`` (as spaCy and
    Prodigy read); where the input came as words, ``tokens`` and ``ner_tags`` too. ``csv``: CSV_COLUMNS, a row an
    entity. Both leave rejected documents out. Offsets are half-open code points.

    Raises:
        UsageError: CoNLL cannot represent a word, or the run's texts do not exist any more.
        StoreError: a part cannot be read.
    """
    lines = {"conll": _conll, "jsonl": _jsonl, "csv": _csv}[form]
    yield from lines(read_rows(run, plan, None), plan.unit)


def words_of(text: str, edges: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Splits a text into words: runs of letters, digits and marks; every other sign is a word.

    Args:
        text: A text.
        edges: Offsets at which a word ends in any case.

    Yields:
        Half-open offsets in code points.
    """
    cuts = set(edges)
    at = 0
    for kind, group in groupby(text, _kind):
        begin, at = at, at + len(list(group))
        if kind == "space":
            continue
        for end in range(begin + 1, at + 1):
            if kind == "sign" or end == at or end in cuts:
                yield begin, end
                begin = end


@lru_cache(maxsize=1 << 16)
def _kind(letter: str) -> str:
    if letter.isspace() or unicodedata.category(letter) == "Cc":
        return "space"
    category = unicodedata.category(letter)
    return "word" if letter.isalnum() or letter == "_" or category[0] == "M" or category == "Cf" else "sign"


def _conll(documents: Iterator[TaggedDocument], unit: str) -> Iterator[str]:
    for document in documents:
        if unit == "document":
            yield f"{_DOCSTART} {OUTSIDE}"
            yield ""
        words, tags = _words_and_tags(document)
        for word, tag in zip(words, tags, strict=True):
            if not word or word == _DOCSTART or not _SPACE.isdisjoint(word):
                raise UsageError(
                    f"document {document.row['doc_id']!r:.80} has the word {word!r:.80}, which CoNLL cannot represent; "
                    "use --format jsonl"
                )
            yield f"{word} {tag}"
        yield ""


def _words_and_tags(document: TaggedDocument) -> tuple[Sequence[str], Sequence[str]]:
    """A document's words and tags; for a text, they are derived from its entities."""
    row = document.row
    if row["words"] is not None:
        return row["words"], row["tags"] or [OUTSIDE] * len(row["words"])
    if row["status"] != "ok":
        return [_UNREADABLE], [OUTSIDE]
    entities = sorted(row["entities"], key=lambda e: (e["start"], e["end"]))
    spans = list(words_of(document.text, [edge for e in entities for edge in (e["start"], e["end"])]))
    tags: list[str] = []
    waiting = iter(entities)
    entity: dict[str, Any] | None = next(waiting, None)
    is_first = True
    for start, _ in spans:
        while entity is not None and entity["end"] <= start:
            entity, is_first = next(waiting, None), True
        if entity is not None and entity["start"] <= start:
            tags.append(f"{'B' if is_first else 'I'}-{entity['label']}")
            is_first = False
        else:
            tags.append(OUTSIDE)
    return [document.text[start:end] for start, end in spans], tags


def _jsonl(documents: Iterator[TaggedDocument], _: str) -> Iterator[str]:
    for document in documents:
        row = document.row
        if row["status"] != "ok":
            continue
        body: dict[str, Any] = {
            "id": row["doc_id"],
            "text": document.text,
            "label": [[e["start"], e["end"], e["label"]] for e in row["entities"]],
            "spans": [{name: e[name] for name in ("start", "end", "label", "score")} for e in row["entities"]],
        }
        if row["words"] is not None:
            body |= {"tokens": row["words"], "ner_tags": row["tags"]}
        yield json.dumps(body, ensure_ascii=False)


def _csv(documents: Iterator[TaggedDocument], _: str) -> Iterator[str]:
    buffer = io.StringIO(newline="")
    rows = csv.writer(buffer, lineterminator="")

    def line(cells: Sequence[object]) -> str:
        buffer.seek(0)
        buffer.truncate()
        rows.writerow(cells)
        return buffer.getvalue()

    yield line(CSV_COLUMNS)
    for document in documents:
        row = document.row
        for e in row["entities"]:
            cells = (row["doc_index"], row["doc_id"], e["start"], e["end"], e["label"], e["text"], round(e["score"], 6))
            yield line(cells)
