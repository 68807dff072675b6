"""Reads gold tags from a CoNLL file as a stream, and checks that they belong to the run's documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from nermill.worker.contracts.conll import LAYOUT_LINES, Sentence, find_layout, join_documents, read_sentences
from nermill.worker.contracts.content import numbered_lines, open_content
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice
from nermill.worker.contracts.tags import Scheme, merge_schemes


class GoldFile:
    """Gold tags of all documents of a run, in the run's order.

    Args:
        path: A CoNLL file, which may be compressed; see ``contracts.conll``.
        unit: What a document of the run is, ``sentence`` or ``document``.
        word_column: Column of the words, from 1, or negative from the end; None searches for it.
        tag_column: Column of the tags, likewise.
        choice: Which labels are renamed or left out.

    Attributes:
        changes: Counter of label changes; see ``contracts.labels``.
        scheme: Scheme in which the tags were written, of those that have been read.

    Raises:
        UsageError: the file cannot be read, or has no tags.
    """

    def __init__(
        self,
        path: Path,
        unit: str,
        word_column: int | None = None,
        tag_column: int | None = None,
        choice: LabelChoice | None = None,
    ) -> None:
        self.path, self.changes = path, Counter[str]()
        self._choice = choice or LabelChoice()
        self.scheme: Scheme = "IOB2"
        head = [(raw or b"").decode(errors="replace") for _, raw in islice(self._lines(), LAYOUT_LINES)]
        layout = find_layout(head, str(path), word_column, tag_column)
        if layout.tag is None and any(head):
            raise UsageError(f"{path}: words without tags; gold is CoNLL, word and tag a line")
        sentences = read_sentences(self._lines(), layout, str(path))
        self._documents = enumerate(join_documents(sentences, str(path)) if unit == "document" else sentences)
        self._taken = 0

    def take(self, rows: pa.RecordBatch) -> pa.Array[Any]:
        """Gold tags of the next rows of the run; documents of the file before the first row are skipped.

        Args:
            rows: Rows with ``doc_index``, ``doc_id``, ``status`` and ``words``.

        Returns:
            A list of tags for each row; null for a rejected row whose sentence in the file has a fault.

        Raises:
            UsageError: the file has fewer documents, or other words.
        """
        tags = []
        columns = (rows[name].to_pylist() for name in ("doc_index", "doc_id", "status", "words"))
        for index, name, status, words in zip(*columns, strict=True):
            sentence = self._advance(index, name)
            if words is None and status == "rejected":
                tags.append(None if sentence.fault else self._choice.tags(sentence.tags, self.changes))
                continue
            if words is None:
                raise UsageError(
                    f"{self.path}: document {name!r} of the run came as text, not as words, so gold tags cannot"
                    " be compared with it; submit the CoNLL file itself"
                )
            if sentence.fault is not None:
                raise UsageError(f"{sentence.fault.message}; correct the gold tags")
            if len(words) != len(sentence.words):
                raise UsageError(
                    f"{self.path}:{sentence.line}: {len(sentence.words)} gold tags for the {len(words)} words of"
                    f" document {name!r}; gold and run must hold the same documents in the same order"
                )
            if words != sentence.words:
                at = next(i for i, pair in enumerate(zip(words, sentence.words, strict=True)) if pair[0] != pair[1])
                raise UsageError(
                    f"{self.path}:{sentence.lines[at]}: the word {sentence.words[at]!r:.60} stands where document"
                    f" {name!r} has {words[at]!r:.60}; gold and run must hold the same documents in the same order"
                )
            tags.append(self._choice.tags(sentence.tags, self.changes))
        return pa.array(tags, pa.list_(pa.string()))

    def finish(self, documents: int) -> None:
        """Checks that the file has no more documents than the run.

        Args:
            documents: Documents of the run.

        Raises:
            UsageError: the file has more.
        """
        for index, sentence in self._read():
            if index >= documents:
                raise UsageError(
                    f"{self.path}:{sentence.line}: gold has more than the run's {documents:,} documents;"
                    " name the file that was submitted"
                )

    def _advance(self, index: int, name: str) -> Sentence:
        for number, sentence in self._read():
            self._taken = number + 1
            if number == index:
                return sentence
        raise UsageError(
            f"{self.path}: gold ends after {self._taken:,} documents, the run has {name!r} as number {index + 1:,};"
            " name the file that was submitted"
        )

    def _read(self) -> Iterator[tuple[int, Sentence]]:
        for number, sentence in self._documents:
            self.scheme = merge_schemes(self.scheme, sentence.scheme)
            yield number, sentence

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        try:
            with open_content(self.path.open("rb"), str(self.path)) as stream:
                yield from numbered_lines(stream)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot read the gold tags ({error.strerror or error})") from None
