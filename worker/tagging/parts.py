"""Commits a shard's part: one Parquet file, which is created once; rejected documents are rows of it."""

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
    """Counts from a part's metadata, for the ledger.

    Attributes:
        ok, rejected: Documents.
        tokens: Tokens that are not padding.
        computed: Tokens computed, padding included.
    """

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
    """Writes a shard's part, unless the part exists already.

    The part is the only file that is written for a shard, so its counts and its rejected rows always agree.

    Args:
        run: The run's folder.
        shard: Its number, which names the part.
        part: The part's rows.
        metadata: File metadata, without prefix.
        stats: Becomes the ``stats`` metadata, as JSON.

    Returns:
        The counts of the part that exists now, and whether this call wrote it.

    Raises:
        StoreError: the store refused the file, or the existing part cannot be read.
    """
    rejected = part.num_rows - part["reject_reason"].null_count
    stats = {**stats, "documents": part.num_rows, "ok": part.num_rows - rejected, "rejected": rejected}
    data = _parquet(part, {**metadata, "shard": str(shard), "stats": json.dumps(stats)})
    if run.write(part_name(shard), data, exclusive=True):
        return _committed(stats), True
    return read_committed(run, shard), False


def read_committed(run: RunFolder, shard: int) -> Committed:
    """The counts of an existing part.

    Raises:
        StoreError: the part cannot be read.
    """
    name = part_name(shard)
    try:
        with open_part(run, shard) as part:
            return _committed(*measurements(part.schema_arrow))
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{run.path(name)}: damaged part ({error}); remove it and run nermill resume") from None


def _committed(*stats: dict[str, Any]) -> Committed:
    """Sums over the shards of a part; a compacted part has several."""
    return Committed(*(sum(s[name] for s in stats) for name in ("ok", "rejected", "tokens", "computed_tokens")))


def _parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata(with_metadata(table.schema, **metadata).metadata)
    pq.write_table(
        described, sink, compression="zstd", use_dictionary=False
    )  # zstd alone compresses as well, in less time
    return bytes(sink.getvalue().to_pybytes())
