"""Small parts become large ones: the same run, cut into larger shards and swapped in as a whole."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from producer.sources.files import filesystem
from producer.status import open_file, part_size, part_stats
from worker.contracts.errors import StoreError, UsageError
from worker.contracts.layout import (
    PLAN_FILE,
    REJECT_FOLDER,
    SHARD_FOLDER,
    SUCCESS_FILE,
    RunFolder,
    part_name,
)
from worker.contracts.plan import Plan, Shard, read_plan
from worker.contracts.schema import METADATA_PREFIX
from worker.contracts.shard import encode_shard, read_shard

TARGET_BYTES = 128 << 20
ASIDE = "_compact"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(run: RunFolder, plan: Plan, target_bytes: int = TARGET_BYTES) -> Plan:
    """Joins consecutive parts, with their documents and rejects, until each has about the target size.

    On a local disk the new folder takes the old one's place in one step: a reader opens files of one state, or
    finds that a file it had listed is gone. A store has no such step; there ``_SUCCESS`` is away during the swap, and a
    swap that was interrupted is taken up by the next call.

    Args:
        run: A complete run.
        plan: Its plan.
        target_bytes: Size that a part should have.

    Returns:
        The run's new plan.

    Raises:
        UsageError: the run is not complete.
        StoreError: the store refuses.
    """
    aside = _aside(run)
    if not run.is_local and aside.exists(PLAN_FILE):
        return _swap_on_store(run, aside)
    missing = {shard.index for shard in plan.shards} - run.committed()
    if missing or plan.is_open or not plan.shards:
        raise UsageError(f"{run.uri}: the run is not complete; nermill resume it first")
    groups = list(_groups(run, plan, target_bytes))
    if len(groups) == len(plan.shards):
        return plan
    if run.is_local:
        shutil.rmtree(aside.uri, ignore_errors=True)
    shards = tuple(_join(run, aside, index, group) for index, group in enumerate(groups))
    compacted = replace(plan, shards=shards, details={**plan.details, "compacted": True})
    compacted.write(aside)
    if run.is_local:
        _swap_folders(run, aside)
    else:
        _swap_on_store(run, aside)
    return compacted


def _aside(run: RunFolder) -> RunFolder:
    if not run.is_local:
        return RunFolder(f"{run.uri}/{ASIDE}")
    folder, name = os.path.split(os.path.abspath(run.uri))
    return RunFolder(f"{folder}/.{name}.compact")


def _groups(run: RunFolder, plan: Plan, target: int) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    size = 0
    for shard in plan.shards:
        cost = part_size(run, shard.index)
        if group and size + cost > target:
            yield group
            group, size = [], 0
        group.append(shard)
        size += cost
    yield group


def _join(run: RunFolder, aside: RunFolder, index: int, group: list[Shard]) -> Shard:
    documents = pa.concat_tables([read_shard(run, shard.index, shard.sha256) for shard in group])
    data, sha256 = encode_shard(documents)
    aside.write(aside.shard_file(index), data)
    stats = [entry for shard in group for entry in part_stats(run, shard.index)]
    metadata = {"shard": str(index), "stats": json.dumps(stats)}
    aside.write(part_name(index), _joined(run, [part_name(shard.index) for shard in group], metadata))
    present = set(run.list(REJECT_FOLDER))
    rejects = [run.reject_file(shard.index) for shard in group if part_name(shard.index) in present]
    if rejects:
        aside.write(aside.reject_file(index), _joined(run, rejects, {}))
    return Shard(index, group[0].first, documents.num_rows, sha256)


def _joined(run: RunFolder, names: list[str], metadata: dict[str, str]) -> bytes:
    """The tables of several files in one, a row group each, with the first one's metadata and what is new."""
    sink = pa.BufferOutputStream()
    writer: Any = None
    try:
        for name in names:
            with open_file(run, name) as stream:
                table = pq.read_table(stream)
            if writer is None:
                added = {(METADATA_PREFIX + key).encode(): value.encode() for key, value in metadata.items()}
                schema = table.schema.with_metadata({**(table.schema.metadata or {}), **added})
                writer = pq.ParquetWriter(sink, schema, compression="zstd")
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{run.path(name)}: damaged ({error}); remove it and nermill resume") from None
    writer.close()
    return bytes(sink.getvalue())


def _swap_folders(run: RunFolder, aside: RunFolder) -> None:
    """The new folder gets whatever else lay in the old one, and its place."""
    old, new = os.path.abspath(run.uri), aside.uri
    ours = {PLAN_FILE, SHARD_FOLDER, REJECT_FOLDER}
    for entry in os.scandir(old):
        if entry.name in ours or (entry.name.startswith("part-") and entry.name.endswith(".parquet")):
            continue
        copy: Callable[..., object] = shutil.copytree if entry.is_dir() else shutil.copy2
        copy(entry.path, f"{new}/{entry.name}")
    try:
        if ctypes.CDLL(None, use_errno=True).renameat2(
            _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
        ):
            raise OSError(ctypes.get_errno(), "renameat2")
    except (OSError, AttributeError):  # a file system or libc without the exchange: gone for a moment, never double
        before = f"{new}.before"
        os.rename(old, before)
        os.rename(new, old)
        os.rename(before, new)
    shutil.rmtree(new)


def _swap_on_store(run: RunFolder, aside: RunFolder) -> Plan:
    """Puts the new files in their places; the plan set aside says what is to be done, so it goes last."""
    plan = read_plan(aside)
    fs, root = filesystem(run.uri)
    run.remove(SUCCESS_FILE)
    for folder in ("", SHARD_FOLDER, REJECT_FOLDER):
        new = {name for name in aside.list(folder) if name.endswith((".parquet", ".arrow"))}
        kept = {name for name in run.list(folder) if name.endswith((".parquet", ".arrow"))}
        for name in sorted(new):
            path = f"{folder}/{name}".lstrip("/")
            fs.copy(f"{root}/{ASIDE}/{path}", f"{root}/{path}")
        for name in sorted(kept - new):
            run.remove(f"{folder}/{name}".lstrip("/"))
    plan.write(run)
    run.write(SUCCESS_FILE, b"")
    fs.rm(f"{root}/{ASIDE}", recursive=True)
    return plan
