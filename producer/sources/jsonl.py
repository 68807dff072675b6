"""JSON lines: one object a line with a text and, if it likes, an id and other fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nermill.producer.sources.files import MAX_LINE_BYTES, SourceFile
from nermill.producer.sources.options import (
    ReadOptions,
    is_unicode,
    no_id_field,
    no_text_field,
    not_utf8,
    printable,
    record_id,
    text_document,
)
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError


def read_jsonl(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a JSONL file.

    Raises:
        UsageError: a line that is not JSON, or no line with the text field, or with the id field that was asked for.
    """
    has_text, first_without = False, ("", [""])
    has_id, first = options.id_column == ReadOptions.id_column, ("", [""])
    for number, line in file.lines():
        where = f"{file.uri}:{number}"
        if line is not None and not line.strip():
            continue
        document, fields = parse_line(line, where, options)
        has_id |= options.id_column in fields
        if fields and not first[0]:  # of a line that cannot be read nobody knows what it has
            first = (where, fields)
        if options.text_column in fields or document.text is not None:
            has_text = True
        elif not first_without[0] and document.fault and document.fault.reason in ("missing_field", "wrong_type"):
            first_without = (where, fields)
        yield document
    if not has_text and first_without[0]:
        raise no_text_field(*first_without, options)
    if not has_id and first[0]:
        raise no_id_field(*first, options)


def parse_line(line: bytes | None, where: str, options: ReadOptions) -> tuple[Document, list[str]]:
    """One line's document, and the fields that the line has.

    Args:
        line: The line; None for one that is too long to be read.
        where: ``path:line``: its id where it has none, its place in messages.
        options: Names of the id and text fields.

    Raises:
        UsageError: the line is not JSON.
    """
    if line is None:
        return Document(where, fault=Fault("too_large", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")), []
    try:
        record = _loads(line.decode(), where)
    except UnicodeDecodeError as error:
        return not_utf8(_salvaged_id(line, where, options), error), []
    if not isinstance(record, dict):
        return Document(where, fault=Fault("wrong_type", f"a {_json_type(record)} where an object should be")), []
    return _document(record, where, options, has_escapes=b"\\u" in line), list(record)


def parse_live_line(line: bytes | None, where: str, options: ReadOptions) -> Document:
    """One line of a stream: where a file with broken JSON is refused, a stream goes on without that line."""
    try:
        return parse_line(line, where, options)[0]
    except UsageError as error:
        return Document(where, fault=Fault("wrong_type", str(error).partition(";")[0]))


def _document(record: dict[str, Any], where: str, options: ReadOptions, *, has_escapes: bool) -> Document:
    try:
        identity = record_id(record.get(options.id_column), where)
    except TypeError as error:
        return Document(where, fault=Fault("wrong_type", str(error)))
    if has_escapes and not is_unicode(json.dumps(record, ensure_ascii=False)):
        return Document(printable(identity), fault=Fault("not_utf8", "lone surrogates (\\ud800 to \\udfff)"))
    text = record.get(options.text_column)
    if text is None:
        return Document(identity, fault=Fault("missing_field", f"no field {options.text_column!r}"))
    if not isinstance(text, str):
        reason = f"{options.text_column!r} is a {_json_type(text)}, not a string"
        return Document(identity, fault=Fault("wrong_type", reason))
    fields = None
    if options.keep_fields:
        fields = {k: v for k, v in record.items() if k not in (options.id_column, options.text_column)}
    return text_document(identity, text, fields)


def _loads(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise UsageError(f"{where}: broken JSON ({reason}); mend the line or name another --format") from None


def _salvaged_id(line: bytes, where: str, options: ReadOptions) -> str:
    try:
        return record_id(_loads(line.decode(errors="replace"), where).get(options.id_column), where)
    except (UsageError, AttributeError, TypeError):
        return where


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
