"""Parquet tables: one row a document, the id and the text from two columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.producer.sources.files import SourceFile, unreadable
from nermill.producer.sources.options import ReadOptions, no_id_field, no_text_field, record_id, text_document
from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError

_ROWS = 1024


def read_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The rows of a Parquet file.

    Raises:
        UsageError: not a Parquet file, or without the columns that were asked for.
    """
    with file.open_raw() as stream:
        try:
            table = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            columns = _columns(table.schema_arrow, file.uri, options)
            number = 0
            for batch in table.iter_batches(_ROWS, columns=columns):
                for row in _rows(batch):
                    number += 1
                    yield _document(row, f"{file.uri}:{number}", options)
        except (pa.ArrowException, OSError, ValueError) as error:
            if getattr(error, "errno", None):
                raise unreadable(file.uri, error) from None
            reason = " ".join(str(error).split())  # Arrow's own may have several lines
            raise UsageError(f"{file.uri}: not a whole Parquet file ({reason}); copy it again") from None


def _columns(schema: pa.Schema, uri: str, options: ReadOptions) -> list[str]:
    names: list[str] = schema.names
    if options.text_column not in names:
        raise no_text_field(uri, names, options)
    if options.id_column not in names and options.id_column != ReadOptions.id_column:
        raise no_id_field(uri, names, options)
    kind = schema.field(options.text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UsageError(f"{uri}: column {options.text_column!r} is {kind}, not a string; mend --text-column")
    return names if options.keep_fields else [n for n in (options.id_column, options.text_column) if n in names]


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            yield {name: _value(batch.column(name)[at]) for name in batch.schema.names}


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _document(row: dict[str, Any], where: str, options: ReadOptions) -> Document:
    try:
        identity = record_id(row.pop(options.id_column, None), where)
    except TypeError as error:
        return Document(where, fault=Fault("wrong_type", str(error)))
    text = row.pop(options.text_column)
    if isinstance(text, UnicodeDecodeError):
        return Document(identity, fault=Fault("not_utf8", "the text is not UTF-8"))
    if text is None:
        return Document(identity, fault=Fault("missing_field", f"{options.text_column!r} is null"))
    return text_document(identity, text, row if options.keep_fields else None)
