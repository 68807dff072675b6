"""One shard to one part: written aside, synced, renamed, with its rejects beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nermill.worker.contracts.document import Fault
from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.schema import REJECTS, metadata_of, with_metadata


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
    faults: dict[int, Fault],
    *,
    attempts: int,
    metadata: dict[str, str],
    stats: dict[str, Any],
) -> tuple[Committed, bool]:
    """Makes a shard's part appear, once: a part that is already there stays, whoever wrote it.

    The rejects are written before, so that a part never stands without them.

    Args:
        run: The run's folder.
        shard: Its number, which names the part.
        part: The part's rows.
        faults: Fault of each rejected row.
        attempts: How often the shard was tried, this time included.
        metadata: File metadata, without prefix.
        stats: Becomes the ``stats`` metadata, as JSON.

    Returns:
        What the part says of itself, and whether it is ours.

    Raises:
        StoreError: the store did not take a file.
    """
    if faults:
        run.write(run.reject_file(shard), _parquet(_rejects(part, faults, attempts), metadata))
    else:
        run.remove(run.reject_file(shard))  # of an attempt that got no further
    rejected = len(faults)
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
        schema = pq.read_schema(pa.BufferReader(run.read(name)))
        stats = json.loads(metadata_of(schema)["stats"])
        return _committed(*stats if isinstance(stats, list) else [stats])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise StoreError(f"{run.path(name)}: damaged part ({error}); remove it and nermill resume") from None


def _committed(*stats: dict[str, Any]) -> Committed:
    """Sums over the shards of a part; a compacted one has many."""
    return Committed(*(sum(s[name] for s in stats) for name in ("ok", "rejected", "tokens", "computed_tokens")))


def _rejects(part: pa.Table, faults: dict[int, Fault], attempts: int) -> pa.Table:
    rows = sorted(faults)
    named = part.select(["doc_index", "doc_id"]).take(pa.array(rows, pa.int64()))
    return pa.table(
        [
            *named.columns,
            pa.array([faults[row].reason for row in rows], pa.string()),
            pa.array([faults[row].message for row in rows], pa.string()),
            pa.array([attempts] * len(rows), pa.int32()),
        ],
        schema=REJECTS,
    )


def _parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata(with_metadata(table.schema, **metadata).metadata)
    pq.write_table(described, sink, compression="zstd", use_dictionary=False)  # zstd finds what repeats, faster
    return bytes(sink.getvalue().to_pybytes())
