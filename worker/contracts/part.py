"""Reads committed parts, their measurements and their rejects, and marks a run complete.

pyarrow ends the process when one of its threads releases a Python object (an open file, or bytes in a
``BufferReader``) while the interpreter stops: ``terminate called without an active exception``. Its threads hold such
an object where a read is buffered ahead or shared among threads. Therefore a part on a disk is opened by its path,
which involves no Python object, and a part on a store is read in the caller's thread alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import DATASETS_FILE, REJECT_FILE, REPORT_JSON, SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.schema import REJECTS, metadata_of

_DATASETS = b"configs:\n- config_name: default\n  data_files: part-*.parquet\n"
_SCORES = ("f1", "precision", "recall", "accuracy", "strict", "per_label")
_READERS = 16  # parts that are read at the same time: on a store each takes a few round trips


@contextmanager
def open_part(run: RunFolder, shard: int) -> Iterator[pq.ParquetFile]:
    """Opens a committed part; read it with ``read_columns`` or ``iter_batches(..., use_threads=run.is_local)``.

    Raises:
        FileNotFoundError: the part does not exist.
        pyarrow.ArrowInvalid, OSError: the part is damaged, or the store does not answer.
    """
    source = run.source(part_name(shard))
    with (
        nullcontext() if isinstance(source, str) else source,
        pq.ParquetFile(source, pre_buffer=False) as part,
    ):
        yield part


def read_columns(run: RunFolder, part: pq.ParquetFile, columns: list[str] | None = None) -> pa.Table:
    """Columns of an open part; all columns where none are named."""
    return part.read(columns, use_threads=run.is_local)


def measurements(schema: pa.Schema) -> list[dict[str, Any]]:
    """The workers' measurements in a part's metadata: one object for each shard of it; a compacted part has several.

    Raises:
        KeyError, ValueError: the metadata is not nermill's.
    """
    stats = json.loads(metadata_of(schema)["stats"])
    return stats if isinstance(stats, list) else [stats]


def file_bytes(part: pq.ParquetFile) -> int:
    """Size of an open part in bytes, from its footer: some dozen bytes less than the size of the file."""
    meta = part.metadata
    groups = (meta.row_group(n) for n in range(meta.num_row_groups))
    pages = sum(group.column(n).total_compressed_size for group in groups for n in range(group.num_columns))
    return int(pages + meta.serialized_size)


def read_rejects(run: RunFolder, shards: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
    """The rejected documents of parts, in order.

    Args:
        run: The run's folder.
        shards: Numbers of the parts.

    Yields:
        Number of each part that has rejects, and its rejects with the REJECTS schema.

    Raises:
        StoreError: a part cannot be read.
    """
    waiting = iter(shards)
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(islice(waiting, _READERS)):
            tables = pool.map(lambda shard: _rejects(run, shard), some)
            yield from ((shard, table) for shard, table in zip(some, tables, strict=True) if table.num_rows)


def mark_complete(run: RunFolder, shards: Iterable[int], before_write: Callable[[], None] = lambda: None) -> None:
    """Copies the rejects of a run's parts to ``_rejects``, then writes ``_SUCCESS``; does nothing where that exists.

    Args:
        run: A run whose planned shards all have their part.
        shards: Numbers of its parts.
        before_write: Called when the rejects are read, before anything is written; not where ``_SUCCESS`` exists.

    Raises:
        StoreError: a part cannot be read, or a file cannot be written.
    """
    if run.exists(SUCCESS_FILE):
        run.sync(SUCCESS_FILE)
        return
    sink, count = pa.BufferOutputStream(), 0
    with pq.ParquetWriter(sink, REJECTS, compression="zstd") as writer:
        for _, table in read_rejects(run, shards):
            writer.write_table(table)
            count += table.num_rows
    before_write()
    if count:
        run.write(REJECT_FILE, sink.getvalue().to_pybytes())
    else:
        run.remove(REJECT_FILE)
    run.write(DATASETS_FILE, _DATASETS)
    run.write(SUCCESS_FILE, b"", exclusive=True)


def scores_of(run: RunFolder) -> dict[str, Any] | None:
    """The scores of an evaluation that was made before, if there is one."""
    if not run.exists(REPORT_JSON):
        return None
    report = json.loads(run.read(REPORT_JSON))
    return {name: report[name] for name in _SCORES if name in report} or None


def _rejects(run: RunFolder, shard: int) -> pa.Table:
    name = part_name(shard)
    try:
        with open_part(run, shard) as part:
            stats = measurements(part.schema_arrow)
            if not any(entry["rejected"] for entry in stats):
                return REJECTS.empty_table()
            table = read_columns(run, part, ["doc_index", "doc_id", "reject_reason", "reject_message"])
        attempts = np.repeat([s.get("attempts", 1) for s in stats], [s["documents"] for s in stats])
        is_rejected = table["reject_reason"].is_valid()
        columns = [*table.columns, pa.array(attempts, pa.int32())]
        return pa.table(columns, schema=_UNFILTERED).filter(is_rejected).cast(REJECTS)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{run.path(name)}: damaged part ({reason}); remove it and run nermill resume") from None


_UNFILTERED = pa.schema([field.with_nullable(True) for field in REJECTS])
