"""Small parts become large ones: the same run, cut into larger shards and swapped in as a whole."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.producer.runs.recovery import BEFORE, beside, finish_swap
from nermill.producer.runs.status import part_stats
from nermill.producer.sources.files import filesystem
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import (
    PLAN_FILE,
    SHARD_FOLDER,
    SUCCESS_FILE,
    RunFolder,
    part_name,
)
from nermill.worker.contracts.part import file_bytes, open_part, read_columns
from nermill.worker.contracts.plan import Plan, Shard, read_plan
from nermill.worker.contracts.schema import METADATA_PREFIX
from nermill.worker.contracts.shard import encode_shard, read_shard
from nermill.worker.contracts.store import store_errors

TARGET_BYTES = 128 << 20
MAX_CHARACTERS = 16 << 20  # of a joined shard: after rejects --retry a worker holds one as a whole
ASIDE = "_compact"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(
    run: RunFolder,
    plan: Plan,
    target_bytes: int = TARGET_BYTES,
    on_shard: Callable[[int, int], None] = lambda *_: None,
) -> Plan:
    """Joins consecutive parts, with their documents, until each has about the target size.

    The new files are made aside, under names that no file of the run ever had. On a local disk the new folder takes
    the old one's place in one step: a reader opens files of one state, or finds that a file it had listed is gone.

    A store has no such step. There ``_plan.json`` moves from the old to the new files in one put, and ``_SUCCESS`` is
    away while both are there. So whoever goes by ``_plan.json``, as nermill does, and whoever lists the folder and
    then finds ``_SUCCESS``, reads each document once, or finds that a file it had listed is gone. An interrupted swap
    is taken up by the next call, by ``nermill resume`` and by ``nermill rejects --retry``.

    Of calls that overlap, the first to end wins; the others find the run changed and leave it as it is.

    Args:
        run: A complete run.
        plan: Its plan.
        target_bytes: Size that a part should have; one of more than MAX_CHARACTERS is not made, however small it is.
        on_shard: Told, after each shard, how many were looked at or joined, and how many that will be: each twice.

    Returns:
        The run's new plan.

    Raises:
        UsageError: the run is not complete.
        StoreError: the store refuses, or the run was changed meanwhile; nothing was removed.
    """
    if finished := finish_interrupted_swap(run):
        return finished
    if plan.is_open or not plan.shards or not _indices(plan) <= run.committed():
        raise UsageError(f"{run.uri}: the run is not complete; nermill resume it first")
    done, steps = count(1), 2 * len(plan.shards)

    def tell() -> None:
        on_shard(next(done), steps)

    groups = list(_groups(run, plan, target_bytes, tell))
    if len(groups) == len(plan.shards):
        if run.is_local:
            _clear(run)
        return plan
    token = uuid.uuid4().hex
    aside = _aside(run, token)
    first = max(run.committed() | run.shards()) + 1
    try:
        shards = tuple(_join(run, aside, index, group, tell) for index, group in enumerate(groups, first))
        compacted = replace(plan, shards=shards, details={**plan.details, "compacted": token})
        compacted.write(aside)
        is_same = read_plan(run).shards == plan.shards and _indices(plan) <= _whole(run)
        if not (is_same and _indices(compacted) <= _whole(aside) and (run.is_local or _begin(run, aside))):
            raise _changed(run)
        if run.is_local:
            _swap_folders(run, aside)
    except BaseException:
        _discard(aside)
        raise
    if not run.is_local and not _swap_on_store(run, compacted):
        raise _changed(run)
    return compacted


def finish_interrupted_swap(run: RunFolder) -> Plan | None:
    """Ends a swap that was interrupted; the run's new plan, or None where its plan is what it was.

    Raises:
        StoreError: the store refuses.
    """
    if run.is_local:
        finish_swap(run)
        return None
    begun = _begun(run)
    if not begun.exists(PLAN_FILE):
        return None
    compacted = read_plan(begun)
    return compacted if _swap_on_store(run, compacted) else None


def _aside(run: RunFolder, token: str) -> RunFolder:
    return RunFolder(beside(run, f"compact.{token}") if run.is_local else f"{run.uri}/{ASIDE}/{token}")


def _begun(run: RunFolder) -> RunFolder:
    """Where the plan of a swap lies that has begun on a store."""
    return RunFolder(f"{run.uri}/{ASIDE}")


def _begin(run: RunFolder, aside: RunFolder) -> bool:
    """Begins the swap on a store, unless another has begun."""
    return _begun(run).write(PLAN_FILE, aside.read(PLAN_FILE), exclusive=True)


def _indices(plan: Plan) -> set[int]:
    return {shard.index for shard in plan.shards}


def _whole(folder: RunFolder) -> set[int]:
    """Shards whose part and documents are there."""
    return folder.committed() & folder.shards()


def _changed(run: RunFolder) -> StoreError:
    return StoreError(f"{run.uri}: changed while it was compacted, and left as it is; compact it again")


def _groups(run: RunFolder, plan: Plan, target: int, tell: Callable[[], None]) -> Iterator[list[Shard]]:
    group: list[Shard] = []
    size = characters = 0
    split = False
    for shard in plan.shards:
        cost, length, came_split = _measure(run, shard.index)
        tell()
        full = size + cost > target or characters + length > MAX_CHARACTERS
        if group and (full or came_split != split):
            yield group
            group, size, characters = [], 0, 0
        group.append(shard)
        size += cost
        characters += length
        split = came_split
    yield group


def _measure(run: RunFolder, shard: int) -> tuple[int, int, bool]:
    """Bytes and characters of a part, and whether its documents came as words: texts and words never share a shard."""
    with _intact(run, shard), open_part(run, shard) as part:
        table = read_columns(run, part, ["n_chars", "words"])
        characters = sum(int(count or 0) for count in table["n_chars"].to_pylist())
        return file_bytes(part), characters, table["words"].null_count < len(table)


@contextmanager
def _intact(run: RunFolder, shard: int) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _changed(run) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{run.path(part_name(shard))}: damaged ({error}); remove it and nermill resume") from None


def _join(run: RunFolder, aside: RunFolder, index: int, group: list[Shard], tell: Callable[[], None]) -> Shard:
    tables = [read_shard(run, shard.index, shard.sha256) for shard in group]
    documents = pa.concat_tables(tables).replace_schema_metadata(tables[-1].schema.metadata)  # where a stream goes on
    data, sha256 = encode_shard(documents)
    aside.write(aside.shard_file(index), data)
    stats = [entry for shard in group for entry in part_stats(run, shard.index)]
    metadata = {"shard": str(index), "stats": json.dumps(stats)}
    aside.write(part_name(index), _joined(run, [shard.index for shard in group], metadata, tell))
    return Shard(index, group[0].first, documents.num_rows, sha256)


def _joined(run: RunFolder, shards: list[int], metadata: dict[str, str], tell: Callable[[], None]) -> bytes:
    """Several parts in one, a row group each, with the first one's metadata and what is new."""
    sink = pa.BufferOutputStream()
    writer: Any = None
    for shard in shards:
        with _intact(run, shard), open_part(run, shard) as part:
            table = read_columns(run, part)
        if writer is None:
            added = {(METADATA_PREFIX + key).encode(): value.encode() for key, value in metadata.items()}
            schema = table.schema.with_metadata({**(table.schema.metadata or {}), **added})
            writer = pq.ParquetWriter(sink, schema, compression="zstd")
        writer.write_table(table.replace_schema_metadata(schema.metadata))
        tell()
    writer.close()
    return bytes(sink.getvalue())


def _swap_folders(run: RunFolder, aside: RunFolder) -> None:
    """The new folder gets whatever else lay in the old one, and its place."""
    old, new = os.path.abspath(run.uri), aside.uri
    ours = {PLAN_FILE, SHARD_FOLDER}
    with store_errors("compact", old):
        with os.scandir(old) as entries:
            for entry in entries:
                if entry.name in ours or (entry.name.startswith("part-") and entry.name.endswith(".parquet")):
                    continue
                copy: Callable[..., object] = shutil.copytree if entry.is_dir() else shutil.copy2
                copy(entry.path, f"{new}/{entry.name}")
        try:
            _exchange(new, old)
        except (OSError, AttributeError):  # a file system or libc without it: gone for a moment, never double
            os.rename(old, beside(run, BEFORE))
            try:
                os.rename(new, old)
            finally:
                finish_swap(run)
    _clear(run)


def _exchange(one: str, other: str) -> None:
    """Two folders change places in one step."""
    swap = ctypes.CDLL(None, use_errno=True).renameat2
    if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


def _swap_on_store(run: RunFolder, compacted: Plan) -> bool:
    """Puts the new files beside the old ones, moves the plan, takes the old ones away; each step may be repeated.

    The plan that lies aside says that there is something to do; it goes last.

    Returns:
        False where the run was compacted since its files were read: it is left as it is.
    """
    fs, root = filesystem(run.uri)
    aside = _aside(run, compacted.details["compacted"])
    now, new, first = read_plan(run).shards, _indices(compacted), compacted.shards[0].index
    is_outdated = now != compacted.shards and now[-1].index >= first
    if is_outdated or not new <= _whole(run) | _whole(aside):
        _clear(run)
        return False
    run.remove(SUCCESS_FILE)
    for path in sorted(_files(aside, new)):
        with store_errors("write", run.path(path)):
            fs.copy(aside.path(path), f"{root}/{path}")
    compacted.write(run)
    if old := sorted(_files(run, range(first))):
        with store_errors("remove files in", root):
            fs.rm([f"{root}/{path}" for path in old])  # a thousand in one request where the store has that
    run.write(SUCCESS_FILE, b"")
    _clear(run)
    return True


def _files(folder: RunFolder, indices: Iterable[int]) -> set[str]:
    """Names of these shards' parts and documents, as far as they are there."""
    there = {f"{prefix}{name}" for prefix in ("", f"{SHARD_FOLDER}/") for name in folder.list(prefix)}
    return there & {name(i) for i in indices for name in (part_name, folder.shard_file)}


def _clear(run: RunFolder) -> None:
    """Removes what lies aside of a run; of compactions at work too, for they read what the run was before."""
    if run.is_local:
        for path in glob.glob(glob.escape(_aside(run, "").uri) + "*"):
            _discard(RunFolder(path))
        return
    begun = _begun(run)
    for token in set(begun.list()) - {PLAN_FILE}:
        _discard(_aside(run, token))
    begun.remove(PLAN_FILE)


def _discard(aside: RunFolder) -> None:
    """Removes a folder aside; on a disk under another name, so that nobody can swap in what is half removed."""
    with store_errors("remove", aside.uri), suppress(FileNotFoundError):
        if aside.is_local:
            doomed = f"{aside.uri.rpartition('.')[0]}.{uuid.uuid4().hex}"
            os.rename(aside.uri, doomed)
            shutil.rmtree(doomed)
        else:
            fs, root = filesystem(aside.uri)
            fs.rm(root, recursive=True)
