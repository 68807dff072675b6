"""Reads CSV and TSV files with a header, quoted as in RFC 4180; each row is a record.

The standard library's parser is used, since it can continue after a damaged record, and the line of each record is
known although fields may contain line breaks.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import Format, ReadOptions, no_id_field, no_text_field, printable, reject
from nermill.producer.sources.record import content_field, record_document
from nermill.worker.contracts import content
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

DELIMITERS = (",", ";", "\t", "|")  # candidates where --delimiter is not given


def read_delimited(file: SourceFile, options: ReadOptions, format_: Format) -> Iterator[Document]:
    """The rows of a CSV or TSV file.

    Raises:
        UsageError: there is no header, or it lacks a column of the options.
    """
    rows = _rows(file, options, format_)
    header = next(rows, None)
    if header is None:
        return
    line, names = header
    names = _checked(names, f"{file.uri}:{line}", options) if isinstance(names, list) else []
    if not names:
        raise UsageError(f"{file.uri}:{line}: no header ({header[1]}); the first line names the columns")
    for line, cells in rows:
        where = f"{file.uri}:{line}"
        if isinstance(cells, str):
            yield reject(where, where, "too_large" if "longer" in cells else "malformed", cells)
        elif len(cells) != len(names):
            noun = "field" if len(cells) == 1 else "fields"
            yield reject(where, where, "malformed", f"{len(cells)} {noun} where the header has {len(names)}")
        else:
            yield _document(dict(zip(names, cells, strict=True)), where, options)


def _document(record: dict[str, str], where: str, options: ReadOptions) -> Document:
    document = record_document(record, where, options)
    if document.fault is not None and document.fault.reason == "not_utf8":
        return reject(document.id, where, "not_utf8", "not UTF-8")
    return document


def _checked(names: list[str], where: str, options: ReadOptions) -> list[str]:
    names = [printable(name.strip()) for name in names]
    if options.text_column not in names:
        raise _no_text_column(where, names, options)
    if options.id_column not in names and options.id_column != ReadOptions.id_column:
        raise no_id_field(where, names, options)
    return names


def _no_text_column(where: str, names: list[str], options: ReadOptions) -> UsageError:
    """The error for a table without the column of texts; the cells of a column of words would be taken for texts."""
    words = content_field(names, options)
    if words is None:
        return no_text_field(where, names, options)
    return UsageError(
        f"{where}: no field {options.text_column!r}, and a cell of {words!r} cannot hold a list of words; "
        "write words and tags as JSONL or Parquet, or name a column of texts with --text-column"
    )


def _rows(file: SourceFile, options: ReadOptions, format_: Format) -> Iterator[tuple[int, list[str] | str]]:
    """First line and cells of each record; a message in the place of the cells where it cannot be read."""
    csv.field_size_limit(content.MAX_LINE_BYTES)
    lines = _Lines(file)
    try:
        delimiter = options.delimiter or ("\t" if format_ == "tsv" else _sniff(lines.peek(), options))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            first = lines.begin()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, _explain(error, lines)
                continue
            if lines.too_long:
                yield first, f"longer than {content.MAX_LINE_BYTES >> 20} MiB"
            elif len(cells) > 1 or any(map(str.strip, cells)):  # else a blank line
                yield first, cells
    finally:
        lines.close()


def _explain(error: csv.Error, lines: _Lines) -> str:
    reason = str(error)
    if "unexpected end of data" in reason or "field larger" in reason:
        lines.replay()
        return "a quote is opened and never closed"
    if "expected after" in reason:
        return "text behind a closing quote; within a quoted field a quote is written twice"
    return f"broken CSV ({reason})"


def _sniff(header: str, options: ReadOptions) -> str:
    """The delimiter with which the header has the column of the text, else the one that makes most columns."""

    def rank(delimiter: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        return options.text_column in names, len(names)

    return max(DELIMITERS, key=rank)


class _Lines:
    """The lines of a file for the parser; after a record that failed, its lines but the first can be read again."""

    def __init__(self, file: SourceFile) -> None:
        self._lines = file.lines(keep_ends=True)
        self._taken: list[tuple[int, str]] = []
        self._waiting: list[tuple[int, str]] = []  # in reverse order
        self._next = 1
        self.too_long = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if not self._waiting:
            number, raw = next(self._lines)
            self._waiting.append((number, "\n" if raw is None else raw.decode(errors="surrogateescape")))
            self.too_long |= raw is None
        line = self._waiting.pop()
        self._taken.append(line)
        self._next = line[0] + 1
        return line[1]

    def peek(self) -> str:
        """The first line, without consuming it; empty for an empty file."""
        line = next(self, "")
        self._waiting, self._taken = self._taken, []
        return line

    def begin(self) -> int:
        """Begins a record; returns the number of its first line."""
        self._taken, self.too_long = [], False
        return self._waiting[-1][0] if self._waiting else self._next

    def replay(self) -> None:
        """Makes all lines of the record but the first be read again."""
        self._waiting += reversed(self._taken[1:])
        self._taken = []

    def close(self) -> None:
        self._lines.close()
