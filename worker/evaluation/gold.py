"""Gold tags from a CoNLL file beside the run: read as a stream, normalised to IOB2, held against each document."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from zstandard import ZstdDecompressor, ZstdError

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.tags import Scheme, detect_scheme, to_iob2

_SEPARATOR = re.compile(r"[ \t]+")  # a no-break space is part of a word
_DOCUMENT_MARK = "-DOCSTART-"


@dataclass(frozen=True, slots=True)
class _Sentence:
    line: int
    words: list[str]
    tags: tuple[str, ...]
    opens_document: bool


class GoldFile:
    """Gold tags of all documents of a run, in the run's order.

    Args:
        path: A CoNLL file, or ``.gz`` or ``.zst`` of one: a word a line, its tag in the last column, an empty line
            after a sentence.
        unit: What a document of the run is, ``sentence`` or ``document`` (up to the next ``-DOCSTART-``).

    Raises:
        UsageError: the file cannot be read, or is not of that kind.
    """

    def __init__(self, path: Path, unit: str) -> None:
        self.path = path
        self.scheme: Scheme = self._detect()
        self._documents = enumerate(self._read_documents() if unit == "document" else self._sentences())
        self._taken = 0

    def take(self, rows: pa.RecordBatch) -> pa.Array:
        """Gold tags of a block's documents; documents between blocks are passed over.

        Args:
            rows: A block with ``doc_index``, ``doc_id``, ``status`` and ``words``.

        Raises:
            UsageError: the file has fewer documents, or other words.
        """
        tags = []
        columns = (rows[name].to_pylist() for name in ("doc_index", "doc_id", "status", "words"))
        for index, name, status, words in zip(*columns, strict=True):
            sentence = self._advance(index, name)
            if words is None and status == "rejected":
                tags.append(sentence.tags)
                continue
            if words is None:
                raise UsageError(
                    f"{self.path}: document {name!r} of the run came as text, not as words, so tags cannot be held"
                    " against it; submit the CoNLL file itself"
                )
            if len(words) != len(sentence.words):
                raise UsageError(
                    f"{self.path}:{sentence.line}: {len(sentence.words)} gold tags for the {len(words)} words of"
                    f" document {name!r}; gold and run must hold the same documents in the same order"
                )
            if words != sentence.words:
                at = next(i for i, pair in enumerate(zip(words, sentence.words, strict=True)) if pair[0] != pair[1])
                raise UsageError(
                    f"{self.path}:{sentence.line + at}: the word {sentence.words[at]!r:.60} stands where document"
                    f" {name!r} has {words[at]!r:.60}; gold and run must hold the same documents in the same order"
                )
            tags.append(sentence.tags)
        return pa.array(tags, pa.list_(pa.string()))

    def finish(self, documents: int) -> None:
        """Checks that gold ends where the run does.

        Raises:
            UsageError: it has more documents.
        """
        for index, sentence in self._documents:
            if index >= documents:
                raise UsageError(
                    f"{self.path}:{sentence.line}: gold goes on after the run's {documents:,} documents;"
                    " name the file that was submitted"
                )

    def _advance(self, index: int, name: str) -> _Sentence:
        for number, sentence in self._documents:
            self._taken = number + 1
            if number == index:
                return sentence
        raise UsageError(
            f"{self.path}: gold ends after {self._taken:,} documents, the run has {name!r} as number {index + 1:,};"
            " name the file that was submitted"
        )

    def _detect(self) -> Scheme:
        line = 0

        def tags() -> Iterator[tuple[str, ...]]:
            nonlocal line
            for sentence in self._raw():
                line = sentence.line
                yield sentence.tags

        try:
            return detect_scheme(tags())
        except ValueError as error:
            raise UsageError(f"{self.path}: in the sentence from line {line}: {error}") from None

    def _sentences(self) -> Iterator[_Sentence]:
        for raw in self._raw():
            yield _Sentence(raw.line, raw.words, to_iob2(raw.tags, self.scheme), raw.opens_document)

    def _read_documents(self) -> Iterator[_Sentence]:
        document: _Sentence | None = None
        for sentence in self._sentences():
            if document is None or sentence.opens_document:
                if document is not None:
                    yield document
                document = sentence
            else:
                words, tags = document.words + sentence.words, document.tags + sentence.tags
                document = _Sentence(document.line, words, tags, document.opens_document)
        if document is not None:
            yield document

    def _raw(self) -> Iterator[_Sentence]:
        first, words, tags, opens = 0, list[str](), list[str](), False
        for number, line in self._lines():
            columns = [column for column in _SEPARATOR.split(line.strip("\r\n")) if column]
            if columns and columns[0] != _DOCUMENT_MARK:
                if len(columns) < 2:
                    raise UsageError(f"{self.path}:{number}: a word without a tag; gold is CoNLL, word and tag a line")
                first = first if words else number
                words.append(columns[0])
                tags.append(columns[-1])
                continue
            if words:
                yield _Sentence(first, words, tuple(tags), opens)
                words, tags, opens = [], [], False
            opens = opens or bool(columns)
        if words:
            yield _Sentence(first, words, tuple(tags), opens)

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            with self._open() as stream:
                yield from enumerate(stream, 1)
        except (OSError, EOFError, ZstdError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{self.path}: cannot read the gold tags ({reason})") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: gold is not UTF-8 ({error.reason} at byte {error.start})") from None

    def _open(self) -> IO[str]:
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rt", encoding="utf-8-sig", newline="\n")
        if self.path.suffix == ".zst":
            return io.TextIOWrapper(ZstdDecompressor().stream_reader(self.path.open("rb"), closefd=True), "utf-8-sig")
        return self.path.open("r", encoding="utf-8-sig", newline="\n")
