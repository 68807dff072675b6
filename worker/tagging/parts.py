"""One shard to one part: written aside, synced, created exclusively; rejected documents are rows of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import measurements, open_part
from nermill.worker.contracts.schema import with_metadata


@dataclass(frozen=True, slots=True)
class Committed:
    """What a part says of itself, for the ledger."""

    ok: int
    rejected: int
    tokens: int
    computed: int


def commit(
    run: RunFolder,
    shard: int,
    part: pa.Table,
    *,
    metadata: dict[str, str],
    stats: dict[str, Any],
) -> tuple[Committed, bool]:
    """Makes a shard's part appear, once: a part that is already there stays, whoever wrote it.

    The part is the only file that a shard writes, so what its counts and its rejects say always agrees.

    Args:
        run: The run's folder.
        shard: Its number, which names the part.
        part: The part's rows.
        metadata: File metadata, without prefix.
        stats: Becomes the ``stats`` metadata, as JSON.

    Returns:
        What the part says of itself, and whether it is ours.

    Raises:
        StoreError: the store did not take the file.
    """
    rejected = part.num_rows - part["reject_reason"].null_count
    stats = {**stats, "documents": part.num_rows, "ok": part.num_rows - rejected, "rejected": rejected}
    data = _parquet(part, {**metadata, "shard": str(shard), "stats": json.dumps(stats)})
    if run.write(part_name(shard), data, exclusive=True):
        return _committed(stats), True
    return read_committed(run, shard), False


def read_committed(run: RunFolder, shard: int) -> Committed:
    """What an existing part says of itself.

    Raises:
        StoreError: the part cannot be read.
    """
    name = part_name(shard)
    try:
        with open_part(run, shard) as part:
            return _committed(*measurements(part.schema_arrow))
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{run.path(name)}: damaged part ({error}); remove it and nermill resume") from None


def _committed(*stats: dict[str, Any]) -> Committed:
    """Sums over the shards of a part; a compacted one has many."""
    return Committed(*(sum(s[name] for s in stats) for name in ("ok", "rejected", "tokens", "computed_tokens")))


def _parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata(with_metadata(table.schema, **metadata).metadata)
    pq.write_table(described, sink, compression="zstd", use_dictionary=False)  # zstd finds what repeats, faster
    return bytes(sink.getvalue().to_pybytes())
