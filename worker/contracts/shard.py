"""The file of a shard: its documents as an Arrow table; the producer writes it, and a worker checks its sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from nermill.worker.contracts.document import Document, Fault
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.schema import SHARD

_WRITE = ipc.IpcWriteOptions(compression="zstd")


def shard_table(documents: Sequence[Document]) -> pa.Table:
    """Documents as a table with the SHARD schema."""
    faults = [document.fault for document in documents]
    columns: list[list[Any]] = [
        [document.id for document in documents],
        [document.text for document in documents],
        [document.words for document in documents],
        [document.gold_tags for document in documents],
        [None if d.fields is None else _as_json(d.fields) for d in documents],
        [fault and fault.reason for fault in faults],
        [fault and fault.message for fault in faults],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SHARD, strict=True)], schema=SHARD)


def _as_json(fields: dict[str, Any]) -> str:
    """Fields as standard JSON: null for NaN and infinity, a string for values that JSON cannot represent."""

    def text_of(value: object) -> str:
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    try:
        text = json.dumps(fields, ensure_ascii=False, default=text_of, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(fields, default=text_of), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def encode_shard(table: pa.Table) -> tuple[bytes, str]:
    """The bytes of a shard's file (Arrow IPC, zstd; with the table's metadata), and their sha256 in hexadecimal."""
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, SHARD.with_metadata(table.schema.metadata), options=_WRITE) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    return data, hashlib.sha256(data).hexdigest()


def read_shard(run: RunFolder, shard: int, sha256: str) -> pa.Table:
    """The documents of a shard, as a table with the SHARD schema.

    Args:
        run: The run's folder.
        shard: The shard's number.
        sha256: Expected hash of its file.

    Raises:
        StoreError: the file is missing or cannot be read.
        UsageError: the file is not the one that was planned, so that another try would fail as well.
    """
    name = run.shard_file(shard)
    data = run.read(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(
            f"{run.path(name)}: damaged since it was planned (sha256 differs); "
            "submit the same input again, which writes the file again"
        )
    try:
        table = ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowInvalid as error:
        raise UsageError(f"{run.path(name)}: not a shard ({error})") from None
    if table.schema != SHARD:
        raise UsageError(f"{run.path(name)}: its columns are not those of a shard of this version")
    return table


def read_documents(table: pa.Table) -> list[Document]:
    """A shard's rows as documents.

    Args:
        table: Documents, with the SHARD schema.
    """
    rows = table.to_pylist()
    return [
        Document(
            id=row["doc_id"],
            text=row["text"],
            words=row["words"] and tuple(row["words"]),
            gold_tags=row["gold_tags"] and tuple(row["gold_tags"]),
            fields=row["fields"] and json.loads(row["fields"]),
            fault=row["fault_reason"] and Fault(row["fault_reason"], row["fault_message"]),
        )
        for row in rows
    ]
