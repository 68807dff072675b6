"""Reads Parquet files: each row is a record, with columns for the id, the text or the words, and the tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions, no_id_field, no_text_field
from nermill.producer.sources.record import content_field, record_document, tags_field
from nermill.worker.contracts.content import unreadable
from nermill.worker.contracts.document import Document
from nermill.worker.contracts.errors import UsageError

_ROWS = 1024


def read_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The rows of a Parquet file.

    Raises:
        UsageError: the file is no Parquet file, is damaged, or lacks a column of the options.
    """
    with file.open_raw() as stream:
        try:
            table = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            schema = table.schema_arrow
            columns = _columns(schema, file.uri, options)
            names = options.tag_names or class_names(schema, tags_field(schema.names))
            number = 0
            for batch in table.iter_batches(_ROWS, columns=columns):
                for row in _rows(batch):
                    number += 1
                    yield record_document(row, f"{file.uri}:{number}", options, names)
        except (pa.ArrowException, OSError, ValueError) as error:
            if getattr(error, "errno", None):
                raise unreadable(file.uri, error) from None
            reason = " ".join(str(error).split())  # Arrow's messages may have several lines
            raise UsageError(f"{file.uri}: not a whole Parquet file ({reason}); copy it again") from None


def class_names(schema: pa.Schema, column: str | None) -> tuple[str, ...]:
    """Names of a column's classes from the metadata that Hugging Face datasets writes; empty where there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        while isinstance(feature, list) or "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return tuple(map(str, feature["names"]))
    except (KeyError, IndexError, TypeError, ValueError):
        return ()


def _columns(schema: pa.Schema, uri: str, options: ReadOptions) -> list[str]:
    names: list[str] = schema.names
    content = content_field(names, options)
    if content is None:
        raise no_text_field(uri, names, options)
    if options.id_column not in names and options.id_column != ReadOptions.id_column:
        raise no_id_field(uri, names, options)
    kind: Any = _plain(schema.field(content).type)
    may_be_text = content == options.text_column
    if not (may_be_text and _is_text(kind)) and not (_is_list(kind) and _is_text(_plain(kind.value_type))):
        wanted = "a string or a list of words" if may_be_text else "a list of words"
        raise UsageError(f"{uri}: column {content!r} is {kind}, not {wanted}; name another with --text-column")
    tags = tags_field(names) if _is_list(kind) else None
    if options.keep_fields:
        return names
    return [name for name in dict.fromkeys((options.id_column, content, tags)) if name in names]


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            yield {name: _value(batch.column(name)[at]) for name in batch.schema.names}


def _value(scalar: pa.Scalar[Any]) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
