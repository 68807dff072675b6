"""Writes and reads files of rows as streams: JSONL, Parquet or CSV, by their suffix."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.worker.contracts.content import unreadable
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.schema import ENTITY
from nermill.worker.contracts.store import store_errors

SUFFIXES = (".jsonl", ".parquet", ".csv")
_BLOCK_ROWS, _BLOCK_CHARACTERS = 8192, 8 << 20  # of one row group of Parquet

Row = dict[str, Any]
Write = Callable[[Row], object]

_TYPES = {
    "doc_index": pa.int64(),
    "entities": pa.list_(pa.struct([*ENTITY, pa.field("redacted", pa.bool_(), nullable=False)])),
}


def suffix_of(name: str) -> str:
    """The suffix of a file, which determines its format.

    Raises:
        UsageError: it is none of SUFFIXES.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{name}: its name shows no format; let it end in {', '.join(SUFFIXES)}")
    return suffix


@contextmanager
def table_writer(name: str, path: str, columns: Sequence[str]) -> Iterator[Write]:
    """A function that writes one row; the file is complete when the ``with`` block ends.

    Args:
        name: The final name of the file; its suffix determines the format.
        path: Where the file is written.
        columns: Names of the columns, in order; ``doc_index`` is an integer, ``entities`` a list (JSON in CSV), the
            others are text.

    Raises:
        UsageError: the suffix is none of SUFFIXES.
        StoreError: the file cannot be written.
    """
    opened = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[suffix_of(name)](path, columns)
    stack = ExitStack()
    add = stack.enter_context(opened)

    def write(row: Row) -> None:
        with store_errors("write", name):
            add(row)

    try:
        yield write
    except BaseException:
        with suppress(Exception):
            stack.close()
        raise
    with store_errors("write", name):
        stack.close()


def read_table(name: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that ``table_writer`` wrote.

    Args:
        name: The file.
        columns: Columns that every row must have.

    Raises:
        UsageError: the file cannot be read, is damaged, or lacks a column.
    """
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[suffix_of(name)]
    number = 0
    try:
        for number, row in enumerate(read(name), 1):
            if missing := [column for column in columns if column not in row]:
                raise UsageError(
                    f"{name}: row {number} has no {', '.join(missing)}; it is not what nermill redact wrote"
                )
            yield row
    except (ValueError, TypeError, csv.Error, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name}: damaged after row {number} ({reason}); redact the run again") from None
    except OSError as error:
        raise unreadable(name, error) from None


@contextmanager
def _write_jsonl(path: str, columns: Sequence[str]) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        yield lambda row: stream.write(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n")


def _read_jsonl(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8", newline="\n") as stream:
        yield from map(json.loads, stream)


@contextmanager
def _write_csv(path: str, columns: Sequence[str]) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(columns)
        yield lambda row: rows.writerow(
            [json.dumps(row[name], ensure_ascii=False) if name == "entities" else row[name] for name in columns]
        )


def _read_csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            entities = {"entities": json.loads(row["entities"])} if "entities" in row else {}
            yield {**row, **entities, "doc_index": int(row.get("doc_index") or 0)}


@contextmanager
def _write_parquet(path: str, columns: Sequence[str]) -> Iterator[Write]:
    schema = pa.schema([pa.field(name, _TYPES.get(name, pa.string())) for name in columns])
    block: list[Row] = []
    characters = 0

    def add(row: Row) -> None:
        nonlocal characters
        block.append(row)
        characters += len(row["text"] or "")
        if len(block) == _BLOCK_ROWS or characters >= _BLOCK_CHARACTERS:
            flush()

    def flush() -> None:
        nonlocal characters
        writer.write_table(pa.Table.from_pylist(block, schema))
        block.clear()
        characters = 0

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield add
        flush()


def _read_parquet(path: str) -> Iterator[Row]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(64):
            yield from batch.to_pylist()
