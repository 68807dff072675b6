"""Reads JSON lines: one object a line, with a text or a list of words, optionally an id and other fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions, not_utf8, reject
from nermill.producer.sources.record import Records, record_id
from nermill.worker.contracts.content import MAX_LINE_BYTES
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError


def read_jsonl(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a JSONL file; blank lines are skipped.

    Raises:
        UsageError: no object has the text field or the id field of the options.
    """
    records = Records(options)
    for number, line in file.lines():
        if line is None or line.strip():
            yield parse_line(line, f"{file.uri}:{number}", options, records)
    records.check()


def parse_line(line: bytes | None, where: str, options: ReadOptions, records: Records | None = None) -> Document:
    """One line's document.

    Args:
        line: The line; None for a line that is too long.
        where: ``path:line``, for messages and for a record without an id.
        options: Names of the id and text fields.
        records: Notes which fields occur in the file; None to ignore them.
    """
    if line is None:
        return reject(where, where, "too_large", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(line.decode(), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        return not_utf8(_id_of_damaged_line(line, where, options), where, error)
    except (ValueError, RecursionError) as error:
        return reject(where, where, "malformed", f"broken JSON ({_reason(error)})")
    return (records or Records(options)).document(record, where)


def parse_live_line(line: bytes | None, where: str, options: ReadOptions) -> Document:
    """One line of a stream.

    Raises:
        UsageError: the record cannot be read, and ``options.on_error`` is ``fail``.
    """
    document = parse_line(line, where, options)
    if document.fault is not None and options.on_error == "fail":
        message = document.fault.message.removeprefix(f"{where}: ")
        raise UsageError(f"{where}: {message}; correct it, or leave it out with --on-error reject")
    return document


def _reason(error: Exception) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"


def _identity(record: Any, where: str, options: ReadOptions) -> str:
    try:
        return record_id(record.get(options.id_column), where)
    except (AttributeError, TypeError):
        return where


def _id_of_damaged_line(line: bytes, where: str, options: ReadOptions) -> str:
    try:
        return _identity(json.loads(line.decode(errors="replace")), where, options)
    except (ValueError, RecursionError):
        return where
