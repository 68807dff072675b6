"""The runs below a folder or URI, from their plans and listings: no part is read but the first of an unnamed model."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from nermill.producer.runs.queue import Queue
from nermill.producer.runs.status import look
from nermill.producer.sources.files import absolute, is_remote, suggestion
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import PLAN_FILE, RunFolder
from nermill.worker.contracts.part import open_part, scores_of
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.contracts.schema import metadata_of

_READERS = 16  # runs that are looked at at once: on a store each takes a few round trips


@dataclass(frozen=True)
class Listed:
    """A run as ``nermill list`` shows it.

    Attributes:
        state: As in ``nermill status``; ``unreadable`` where its plan cannot be read, with the reason in ``message``.
        documents: Those that were submitted (``total``), and those whose part is there (``finished``).
        created: UTC time, ISO 8601.
        model: Name of the artifact that was asked for or, where none was, of the one that made the first part.
        f1: Of its evaluation; None where there is none.
    """

    run: str
    run_id: str
    state: str
    documents: dict[str, int]
    created: str = ""
    model: str = ""
    f1: float | None = None
    message: str = ""

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return asdict(self)


def list_runs(out: str, find_queue: Callable[[], Queue | None]) -> list[Listed]:
    """The runs below a local folder at any depth, or directly below a URI; the oldest first.

    Args:
        out: The folder or URI, or a run itself.
        find_queue: Asked once a run is not complete, to tell whether it is at work; None where nobody answers.

    Raises:
        UsageError: there is no such folder.
        StoreError: it cannot be listed.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        listed = list(pool.map(lambda run: _look(run, find_queue), find_runs(out)))
    return sorted(listed, key=lambda entry: (entry.created, entry.run))


def find_runs(out: str) -> list[RunFolder]:
    """The folders of runs below a local folder at any depth, or directly below a URI.

    Raises:
        UsageError: there is no such folder.
        StoreError: it cannot be listed.
    """
    out = absolute(out)
    if RunFolder(out).exists(PLAN_FILE):
        return [RunFolder(out)]
    if is_remote(out):
        return [RunFolder(f"{out}/{name}") for name in RunFolder(out).list() if name.startswith("run=")]
    if not os.path.isdir(out):
        raise UsageError(f"{out}: no such folder{suggestion(out)}")
    found = []
    for folder, subfolders, _ in os.walk(out):
        found += [RunFolder(os.path.join(folder, name)) for name in subfolders if name.startswith("run=")]
        subfolders[:] = [name for name in subfolders if not name.startswith(("run=", "_", "."))]
    return found


def _look(run: RunFolder, find_queue: Callable[[], Queue | None]) -> Listed:
    try:
        plan = read_plan(run)
        committed = run.committed()
        finished = [shard.documents for shard in plan.shards if shard.index in committed]
        scores = scores_of(run) or {}
    except (UsageError, StoreError) as error:
        none = {"total": 0, "finished": 0}
        return Listed(run.uri, run.uri.rpartition("run=")[2], "unreadable", none, message=str(error))
    is_complete = not plan.is_open and len(finished) == len(plan.shards)
    return Listed(
        run.uri,
        plan.run_id,
        "complete" if is_complete else look(run, plan, find_queue()).state,
        {"total": plan.documents, "finished": sum(finished)},
        plan.created,
        plan.model["name"] or _model_of_parts(run, plan, committed),
        scores.get("f1"),
    )


def _model_of_parts(run: RunFolder, plan: Plan, committed: set[int]) -> str:
    """Name of the artifact that made the first part; empty where there is none, or none that can be read."""
    first = next((shard.index for shard in plan.shards if shard.index in committed), None)
    if first is None:
        return ""
    try:
        with open_part(run, first) as part:
            return metadata_of(part.schema_arrow).get("model", "")
    except (pa.ArrowException, OSError):
        return ""
