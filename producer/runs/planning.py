"""A run before it is sent: inputs known by hash, documents in shards, ``_plan.json`` last; on an error, nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from nermill.producer.runs.recovery import finish_swap
from nermill.producer.runs.shards import ShardLimits, group_documents, write_shard, write_shards
from nermill.producer.sources import ReadOptions, Source, open_sources
from nermill.producer.sources.files import absolute, filesystem, is_remote
from nermill.producer.sources.reading import OnRead, Reading, ignore_progress
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.labels import bare_labels, choice_of
from nermill.worker.contracts.layout import FIRST_LAYOUT, PLAN_FILE, SHARD_FOLDER, RunFolder
from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.contracts.plan import PLAN_VERSION, Input, Options, Plan, Priority, Shard, read_plan
from nermill.worker.contracts.shard import read_shard

RUN_ID_LENGTH = 12


@dataclass(frozen=True)
class Request:
    """What is to be tagged, how, and where the result goes.

    Attributes:
        inputs: Files, folders, globs, URIs.
        out: Folder or URI that holds runs.
        model: Artifact, by name or path; None leaves it to the workers.
        priority: Whose shards go first; no part of the run's identity.
        by_value: Documents travel through the broker, not through the run's folder.
    """

    inputs: tuple[str, ...]
    out: str
    model: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    options: Options = field(default_factory=Options)
    limits: ShardLimits = field(default_factory=ShardLimits)
    priority: Priority = "normal"
    by_value: bool = False


@dataclass(frozen=True)
class Found:
    """The files that a request names, known by their content.

    Attributes:
        sources: The files that are read, in order.
        prints: sha256 and size in bytes of each.
        left_out: Files that are not read, each with the reason.
    """

    sources: list[Source]
    prints: list[tuple[str, int]]
    left_out: list[str]

    def __len__(self) -> int:
        return len(self.sources)


def find_inputs(request: Request) -> Found:
    """The files that a request names, known by their content.

    Raises:
        UsageError: one is missing, empty, or of no known format.
    """
    inputs = open_sources(request.inputs, request.read)
    return Found(inputs.sources, [source.file.fingerprint() for source in inputs.sources], inputs.left_out)


def without_tagged(out: str, found: Found) -> Found:
    """Leaves out the files that a complete run below ``out`` had as an input, known by their sha256.

    Raises:
        UsageError: a plan there is damaged.
    """
    root = RunFolder(normalised(out))
    tagged: set[str] = set()
    for run in (RunFolder(f"{root.uri}/{name}") for name in root.list() if name.startswith("run=")):
        if run.exists(PLAN_FILE):
            plan = read_plan(run)
            if not plan.is_open and {shard.index for shard in plan.shards} <= run.committed():
                tagged.update(entry.sha256 for entry in plan.inputs)
    new = [at for at, (sha256, _) in enumerate(found.prints) if sha256 not in tagged]
    return Found([found.sources[at] for at in new], [found.prints[at] for at in new], found.left_out)


def make_plan(
    request: Request, on_read: OnRead = ignore_progress, found: Found | None = None
) -> tuple[RunFolder, Plan]:
    """Plans a run, or finds the one that the same request made before, and repairs its shards.

    Args:
        request: What to plan.
        on_read: Told now and then how far the reading is.
        found: The inputs, where they were looked for before.

    Raises:
        UsageError: an input, the model or the output is wrong; nothing was written.
        StoreError: the store does not take the shards; what was written is gone again.
    """
    out = normalised(request.out)
    model = model_identity(request.model, request.options)
    found = find_inputs(request) if found is None else found
    sources, prints = found.sources, found.prints
    run_id = planned_run_id(out, request, model, sources, prints)
    run = RunFolder(f"{out}/run={run_id}")
    if not is_remote(out):
        check_writable(out)
        finish_swap(run)
    reading = Reading(sources, [size for _, size in prints], request.read, on_read)
    if run.exists(PLAN_FILE):
        plan = _repaired(run, read_plan(run), reading, request.limits)
        if plan.priority != request.priority:
            plan = replace(plan, priority=request.priority)
            plan.write(run)
        return run, plan
    with nothing_half_written(run):
        for stale in run.list(SHARD_FOLDER):
            run.remove(f"{SHARD_FOLDER}/{stale}")
        shards = tuple(write_shards(run, reading.documents(), request.limits))
        plan = replace(
            plan_of_input(request, run_id, model, found, reading),
            shards=shards,
            details=details_of_input(found, reading.rejected),
        )
        plan.write(run)
    return run, plan


def plan_of_input(request: Request, run_id: str, model: dict[str, str], found: Found, reading: Reading) -> Plan:
    """The plan of an input that was read to its end, without its shards and details."""
    return Plan(
        run_id=run_id,
        created=utc_now(),
        model=model,
        options=request.options,
        inputs=tuple(
            Input(source.file.uri, source.format, size, sha256, count)
            for source, (sha256, size), count in zip(found.sources, found.prints, reading.counts, strict=True)
        ),
        shards=(),
        unit=request.read.unit if any(source.format == "conll" for source in found.sources) else "document",
        has_gold=reading.has_gold,
        priority=request.priority,
    )


def details_of_input(found: Found, rejected: int) -> dict[str, Any]:
    """What a plan tells of its input beside the plan's own fields: files that were left out, documents rejected."""
    details = {"left_out": found.left_out, "rejected": rejected}
    return {name: value for name, value in details.items() if value}


def _repaired(run: RunFolder, plan: Plan, reading: Reading, limits: ShardLimits) -> Plan:
    """A run's plan; shards without a part whose documents are gone or damaged are written anew from the input."""
    committed = run.committed()
    broken = {shard.index for shard in plan.shards if shard.index not in committed and not _is_whole(run, shard)}
    if not broken or plan.details.get("compacted"):
        return plan
    shards: list[Shard] = []
    for shard, group in zip_longest(plan.shards, group_documents(reading.documents(), limits)):
        if shard is None or group is None or shard.documents != len(group):
            raise UsageError(
                f"{run.uri}: planned by another version of nermill, which cuts the input into other shards; "
                "name another --out, or remove this folder"
            )
        shards.append(write_shard(run, shard.index, shard.first, group) if shard.index in broken else shard)
    if tuple(shards) != plan.shards:  # another version of Arrow writes other bytes
        plan = replace(plan, shards=tuple(shards))
        plan.write(run)
    return plan


def _is_whole(run: RunFolder, shard: Shard) -> bool:
    try:
        read_shard(run, shard.index, shard.sha256)
    except (StoreError, UsageError):
        return False
    return True


def model_identity(model: str | None, options: Options | None = None) -> dict[str, str]:
    """Name and hash of the artifact that a run asks for; both empty where the workers may choose.

    Raises:
        ArtifactError: it is not there, or was changed.
        UsageError: its windows cannot overlap so much, or it lacks a label that the options name.
    """
    if model is None:
        return {"name": "", "sha256": ""}
    manifest = load_manifest(resolve_artifact(model))  # which hashes every file: once is enough
    if options is not None:
        manifest.check_overlap(options.overlap)
        choice_of(options).check(bare_labels(manifest.labels), model)
    return {"name": model, "sha256": manifest.sha256}


def normalised(out: str) -> str:
    """The output as producer and workers both understand it: a URI, or an absolute path.

    Raises:
        UsageError: nobody serves the URI, or it is a run's folder itself.
    """
    out = absolute(out)
    if is_remote(out):
        filesystem(out)
    if RunFolder(out).exists(PLAN_FILE) or RunFolder(out).exists(FIRST_LAYOUT):
        raise UsageError(f"{out}: a run's folder itself; name the folder around it with --out, or nermill resume it")
    return out


def check_writable(out: str) -> str:
    """Looks before the work starts whether a local output can be made and written.

    Returns:
        The folder that is there already: the output, or the nearest around it.

    Raises:
        UsageError: it cannot.
    """
    existing = out
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UsageError(f"{out}: cannot be a folder, {existing} is a file; name another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{out}: cannot be written (permission denied in {existing}); name another --out")
    return existing


@contextmanager
def nothing_half_written(run: RunFolder) -> Iterator[None]:
    """Takes away what was written inside, folders included, when an error ends it before the plan is there."""
    missing = []
    path = run.uri
    while run.is_local and not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        yield
    except BaseException:
        if run.exists(PLAN_FILE):  # somebody else planned the same meanwhile
            raise
        if run.is_local:
            shutil.rmtree(run.uri, ignore_errors=True)
            for folder in missing[1:]:
                with suppress(OSError):  # it is not empty; or the disk fails, as the error that ended it says
                    os.rmdir(folder)
        else:
            for name in run.list(SHARD_FOLDER):
                run.remove(f"{SHARD_FOLDER}/{name}")
        raise


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def planned_run_id(
    out: str, request: Request, model: dict[str, str], sources: list[Source], prints: list[tuple[str, int]]
) -> str:
    """The run's name: a hash of all that its result depends on, and of its place, since workers know it by name alone.

    The same request meets its own run again; the same with another output is another run.
    """
    inputs = [(source.file.uri, source.format, sha256) for source, (sha256, _) in zip(sources, prints, strict=True)]
    asked = [PLAN_VERSION, out, inputs, model, asdict(request.read), asdict(request.options), asdict(request.limits)]
    if request.by_value:
        asked.append("by value")
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:RUN_ID_LENGTH]
    return f"f{digest[1:]}" if digest.isdecimal() else digest  # readers of OUT take a column of digits for numbers
