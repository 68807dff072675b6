"""Small parts become large ones: the same run, cut into larger shards and swapped in as a whole."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from producer.sources.files import filesystem
from producer.status import open_file, part_stats
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
from worker.contracts.store import telling

TARGET_BYTES = 128 << 20
ASIDE = "_compact"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(run: RunFolder, plan: Plan, target_bytes: int = TARGET_BYTES) -> Plan:
    """Joins consecutive parts, with their documents and rejects, until each has about the target size.

    On a local disk the new folder takes the old one's place in one step: a reader opens files of one state, or
    finds that a file it had listed is gone.

    A store has no such step. There the new files get names that no file of the run ever had, ``plan.json`` moves
    from the old to the new ones in one put, and ``_SUCCESS`` is away while both are there. So whoever goes by
    ``plan.json``, as nermill does, and whoever lists the folder and then finds ``_SUCCESS``, reads each document
    once, or finds that a file it had listed is gone. An interrupted swap is taken up by the next call, and by
    ``nermill resume``.

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
    if taken_up := take_up(run):
        return taken_up
    aside = _aside(run)
    missing = {shard.index for shard in plan.shards} - run.committed()
    if missing or plan.is_open or not plan.shards:
        raise UsageError(f"{run.uri}: the run is not complete; nermill resume it first")
    groups = list(_groups(run, plan, target_bytes))
    if len(groups) == len(plan.shards):
        return plan
    if run.is_local:
        shutil.rmtree(aside.uri, ignore_errors=True)
    else:
        _remove(aside, _files(aside))  # of a call that was ended before its plan
    first = 0 if run.is_local else max(run.committed() | run.shards()) + 1
    shards = tuple(_join(run, aside, index, group) for index, group in enumerate(groups, first))
    compacted = replace(plan, shards=shards, details={**plan.details, "compacted": True})
    compacted.write(aside)
    if run.is_local:
        _swap_folders(run, aside)
    else:
        _swap_on_store(run, aside, compacted)
    return compacted


def take_up(run: RunFolder) -> Plan | None:
    """Ends a swap on a store that was interrupted; the run's new plan, or None where there was no such swap.

    Raises:
        StoreError: the store refuses.
    """
    aside = _aside(run)
    if run.is_local or not aside.exists(PLAN_FILE):
        return None
    compacted = read_plan(aside)
    _swap_on_store(run, aside, compacted)
    return compacted


def _aside(run: RunFolder) -> RunFolder:
    if not run.is_local:
        return RunFolder(f"{run.uri}/{ASIDE}")
    folder, name = os.path.split(os.path.abspath(run.uri))
    return RunFolder(f"{folder}/.{name}.compact")


def _groups(run: RunFolder, plan: Plan, target: int) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    size, split = 0, False
    for shard in plan.shards:
        cost, came_split = _measure(run, part_name(shard.index))
        if group and (size + cost > target or came_split != split):
            yield group
            group, size = [], 0
        group.append(shard)
        size += cost
        split = came_split
    yield group


def _measure(run: RunFolder, part: str) -> tuple[int, bool]:
    """Bytes of a part, and whether its documents came as words: texts and words never share a shard."""
    with _intact(run, part), open_file(run, part) as stream:
        words = pq.read_table(stream, columns=["words"])["words"]
        return int(stream.seek(0, os.SEEK_END)), words.null_count < len(words)


@contextmanager
def _intact(run: RunFolder, part: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{run.path(part)}: damaged ({error}); remove it and nermill resume") from None


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
    for name in names:
        with _intact(run, name), open_file(run, name) as stream:
            table = pq.read_table(stream)
        if writer is None:
            added = {(METADATA_PREFIX + key).encode(): value.encode() for key, value in metadata.items()}
            schema = table.schema.with_metadata({**(table.schema.metadata or {}), **added})
            writer = pq.ParquetWriter(sink, schema, compression="zstd")
        writer.write_table(table.replace_schema_metadata(schema.metadata))
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


def _swap_on_store(run: RunFolder, aside: RunFolder, compacted: Plan) -> None:
    """Puts the new files beside the old ones, moves the plan, takes the old ones away; each step may be repeated.

    The plan that lies aside says that there is something to do: the files beside it stay as long as it does.
    """
    fs, root = filesystem(run.uri)
    run.remove(SUCCESS_FILE)
    shards = {shard.index for shard in compacted.shards}
    new = {name(shard) for shard in shards for name in (part_name, run.shard_file, run.reject_file)}
    there = _files(aside)
    for path in sorted(new & there):
        with telling("write", run.path(path)):
            fs.copy(f"{root}/{ASIDE}/{path}", f"{root}/{path}")
    compacted.write(run)
    _remove(run, _files(run) - new)
    run.write(SUCCESS_FILE, b"")
    aside.remove(PLAN_FILE)
    _remove(aside, there)


def _files(folder: RunFolder) -> set[str]:
    """Names of the parts, rejects and shards that are there."""
    return {
        f"{prefix}{name}"
        for prefix in ("", f"{SHARD_FOLDER}/", f"{REJECT_FOLDER}/")
        for name in folder.list(prefix)
        if name.endswith((".parquet", ".arrow"))
    }


def _remove(folder: RunFolder, names: set[str]) -> None:
    """Removes files of a store, a thousand in one request where it has that."""
    fs, root = filesystem(folder.uri)
    with telling("remove files in", root):
        if names:
            fs.rm([f"{root}/{name}" for name in sorted(names)])
