"""The Arrow schemas of a run: shards (documents), parts (annotations) and rejects."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

SCHEMA_VERSION = "2"
OFFSET_UNIT = "unicode_code_point"
METADATA_PREFIX = "nermill."

ENTITY = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def _schema(*columns: pa.Field[Any]) -> pa.Schema:
    return pa.schema(columns)


# One row for each document, in input order; exactly one of text, words and fault_reason is set.
SHARD = _schema(
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("words", pa.list_(pa.string())),
    pa.field("gold_tags", pa.list_(pa.string())),
    pa.field("fields", pa.string()),
    pa.field("fault_reason", pa.string()),
    pa.field("fault_message", pa.string()),
)

PART = _schema(
    pa.field("doc_index", pa.int64(), nullable=False),
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("n_chars", pa.int32(), nullable=False),
    pa.field("n_tokens", pa.int32(), nullable=False),
    pa.field("n_windows", pa.int16(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("entities", pa.list_(ENTITY), nullable=False),
    pa.field("words", pa.list_(pa.string())),
    pa.field("tags", pa.list_(pa.string())),
    pa.field("gold_tags", pa.list_(pa.string())),
    pa.field("reject_reason", pa.string()),  # null where the document was tagged
    pa.field("reject_message", pa.string()),
    pa.field("text", pa.string()),
    pa.field("fields", pa.string()),
)
OPTIONAL_COLUMNS = ("text", "fields")  # present with --keep-text and --keep-fields

REJECTS = _schema(
    pa.field("doc_index", pa.int64(), nullable=False),
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("message", pa.string(), nullable=False),
    pa.field("attempts", pa.int32(), nullable=False),
)


def part_schema(*, keep_text: bool, keep_fields: bool) -> pa.Schema:
    """The part schema with those optional columns that a run keeps."""
    kept = {"text": keep_text, "fields": keep_fields}
    return pa.schema([field for field in PART if kept.get(field.name, True)])


def with_metadata(schema: pa.Schema, **values: str) -> pa.Schema:
    """The schema with file metadata.

    Args:
        schema: A schema.
        values: Metadata by key; each key becomes ``nermill.<key>``. ``schema_version`` and ``offset_unit`` are added.
    """
    values = {"schema_version": SCHEMA_VERSION, "offset_unit": OFFSET_UNIT, **values}
    return schema.with_metadata({METADATA_PREFIX + key: value for key, value in values.items()})


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """The ``nermill.<key>`` metadata of a file, without the prefix."""
    raw: dict[bytes, bytes] = schema.metadata or {}
    pairs = ((key.decode(), value.decode()) for key, value in raw.items())
    return {key.removeprefix(METADATA_PREFIX): value for key, value in pairs if key.startswith(METADATA_PREFIX)}
