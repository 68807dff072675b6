"""Texts to measure with: CoNLL files (with their tags), JSONL with ``text``, or plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from nermill.worker.contracts.errors import UsageError

_OTHERS = (".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".bz2", ".xz")  # they would be taken for plain lines


@dataclass(frozen=True)
class Text:
    """A text, or the words of one with their gold tags."""

    content: str | tuple[str, ...]
    gold: tuple[str, ...] = ()


def read_texts(inputs: Sequence[str], unit: str = "sentence") -> list[Text]:
    """Reads local files; a record, a line, or a ``unit`` of CoNLL (``sentence`` or ``document``) is a text.

    Raises:
        UsageError: a file cannot be read, or holds no text; the message names file and line.
    """
    if unit not in ("sentence", "document"):
        raise UsageError(f"--unit {unit!r}: one of sentence, document")
    conll = _sentences if unit == "sentence" else _documents
    texts = []
    for name in inputs:
        if name.endswith(_OTHERS):
            raise UsageError(f"{name}: CoNLL, JSONL or plain lines are read here")
        try:
            lines = Path(name).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{name}: cannot be read ({reason})") from None
        reader = _records if name.endswith((".jsonl", ".ndjson")) else conll if _is_conll(lines) else _lines
        found = list(reader(name, lines))
        if not found:
            raise UsageError(f"{name}: holds no text")
        texts += found
    return texts


def encode(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[tuple[list[int], list[int | None]]]:
    """Token ids of each text without special tokens, and each token's word number where the words are known."""
    encodings = [
        tokenizer.encode(text.content, is_pretokenized=not isinstance(text.content, str), add_special_tokens=False)
        for text in texts
    ]
    return [(encoding.ids, encoding.word_ids) for encoding in encodings]


def _is_conll(lines: Sequence[str]) -> bool:
    rows = [line.split() for line in lines[:200] if line.strip() and not line.startswith("-DOCSTART-")]
    return bool(rows) and all(len(row) == len(rows[0]) in (2, 4) for row in rows)


def _records(name: str, lines: Sequence[str]) -> Iterator[Text]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield Text(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{name}:{number}: no JSON object with a text") from None


def _sentences(name: str, lines: Sequence[str]) -> Iterator[Text]:
    words: list[str] = []
    tags: list[str] = []
    for line in [*lines, ""]:
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield Text(tuple(words), tuple(tags))
            words, tags = [], []


def _documents(name: str, lines: Sequence[str]) -> Iterator[Text]:
    """The sentences up to a -DOCSTART- line as one text."""
    starts = [number for number, line in enumerate(lines) if line.startswith("-DOCSTART-")]
    for begin, end in pairwise([0, *starts, len(lines)]):
        sentences = list(_sentences(name, lines[begin:end]))
        if sentences:
            words = tuple(word for sentence in sentences for word in sentence.content)
            yield Text(words, tuple(tag for sentence in sentences for tag in sentence.gold))


def _lines(name: str, lines: Sequence[str]) -> Iterator[Text]:
    return (Text(line.strip()) for line in lines if line.strip())
