"""What a run has come to: counted from its parts, which are the truth; the ledger adds who is at work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from nermill.producer.runs.queue import Queue
from nermill.worker.contracts.errors import StoreError
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.part import measurements, open_part, scores_of
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.records import Progress, WorkerProcess
from nermill.worker.contracts.schema import metadata_of

_READERS = 16

State = Literal["running", "complete", "incomplete", "cancelled"]


@dataclass(frozen=True)
class Status:
    """A run at one moment; ``as_json`` gives the public names.

    Attributes:
        progress: The ledger's view; state ``unknown`` without a broker or for a run it does not know.
        seconds: Those in which some worker held a shard.
        workers: Device and documents of each worker that committed a part.
        listening: Worker processes that live at the broker.
    """

    run: str
    run_id: str
    state: State
    planned: int
    committed: int
    total: int
    ok: int
    rejected: int
    tokens: int
    computed_tokens: int
    seconds: float
    progress: Progress = field(default_factory=Progress)
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    listening: tuple[WorkerProcess, ...] = ()
    scores: dict[str, Any] | None = None

    @property
    def finished_documents(self) -> int:
        return self.ok + self.rejected

    @property
    def documents_per_second(self) -> float:
        return self.finished_documents / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.computed_tokens if self.computed_tokens else 0.0

    @property
    def eta_seconds(self) -> float | None:
        if self.state == "running" and not self.listening:
            return None  # nobody is at work, whatever the speed was before
        rate = self.documents_per_second
        return (self.total - self.finished_documents) / rate if rate else None

    @property
    def trouble(self) -> str:
        """Why the run does not go on, and what to do about it; empty where nothing is known to be wrong."""
        wanted = self.progress.artifact
        served = {worker.artifact: f"{worker.model} ({worker.artifact[:12]})" for worker in self.listening}
        is_stuck = self.progress.waiting and not self.progress.leased
        if is_stuck and served and wanted and wanted not in served:
            return (
                f"no worker serves the artifact that the run asks for, {wanted[:12]}; those at the broker serve "
                f"{', '.join(sorted(served.values()))}. Start one with nermill-worker --model THAT_ARTIFACT, or cancel "
                "the run and submit its documents with --model"
            )
        return self.progress.last_error

    @property
    def exit_code(self) -> int:
        return 0 if self.state == "complete" and not self.rejected else 3

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        body: dict[str, Any] = {
            "run": self.run,
            "run_id": self.run_id,
            "state": self.state,
            "shards": {
                "planned": self.planned,
                "committed": self.committed,
                "waiting": self.progress.waiting,
                "leased": self.progress.leased,
            },
            "at_work": {"tokens": self.progress.leased_tokens, "computed": self.progress.leased_computed},
            "documents": {"total": self.total, "ok": self.ok, "rejected": self.rejected},
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "documents_per_second": round(self.documents_per_second, 2),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "padding_share": round(self.padding_share, 4),
            "eta_seconds": None if self.eta_seconds is None else round(self.eta_seconds, 1),
            "workers": self.workers,
            "listening": [worker.name for worker in self.listening],
            "trouble": self.trouble,
        }
        if self.scores is not None:
            body["scores"] = self.scores
        return body


class PartTotals:
    """The sums over a run's parts; a part is read once, however often one looks."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._stats: dict[int, list[dict[str, Any]]] = {}

    def update(self, planned: set[int]) -> set[int]:
        """Looks for parts that are new or gone; returns the planned shards that are committed."""
        committed = planned & self._run.committed()
        for shard in self._stats.keys() - committed:
            del self._stats[shard]
        new = sorted(committed - self._stats.keys())
        with ThreadPoolExecutor(_READERS) as pool:  # on a store each footer is a few round trips
            self._stats.update(zip(new, pool.map(lambda shard: part_stats(self._run, shard), new), strict=True))
        return committed

    def sum(self, name: str) -> int:
        return sum(int(stats.get(name, 0)) for stats in self._entries())

    def seconds(self, busy_until: float = 0.0) -> float:
        """Seconds in which some worker held a shard: a pause between a run and its continuation is no work.

        Args:
            busy_until: Unix time up to which workers are at work since the last part; 0 where none is.
        """
        spans = sorted((float(s["claimed"]), float(s["finished"])) for s in self._entries())
        if spans and busy_until:
            spans.append((max(end for _, end in spans), busy_until))
        total, reached = 0.0, 0.0
        for start, end in spans:
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total

    def workers(self) -> dict[str, dict[str, Any]]:
        """What each worker did."""
        found: dict[str, dict[str, Any]] = {}
        for stats in self._entries():
            entry = found.setdefault(str(stats["worker"]), {"device": stats["device"], "shards": 0, "documents": 0})
            entry["shards"] += 1
            entry["documents"] += stats["documents"]
        return dict(sorted(found.items()))

    def _entries(self) -> Iterator[dict[str, Any]]:
        return (entry for entries in self._stats.values() for entry in entries)


def look(run: RunFolder, plan: Plan, queue: Queue | None = None, totals: PartTotals | None = None) -> Status:
    """A run's status now; without a queue only what the folder knows.

    A run by value whose plan is open is looked at in the ledger alone.

    Raises:
        StoreError: the folder cannot be read.
        BrokerError: the queue does not answer.
    """
    progress, listening = Progress(), tuple[WorkerProcess, ...]()
    if queue is not None:
        with queue.ledger() as ledger:
            progress, listening = ledger.progress(plan.run_id), tuple(ledger.workers())
    if plan.is_followed_by_ledger and progress.state != "unknown":
        return _by_ledger(run, plan, progress, listening)
    totals = totals or PartTotals(run)
    planned = run.shards() if plan.is_open else {shard.index for shard in plan.shards}
    committed = totals.update(planned)
    busy = bool(progress.waiting or progress.leased)
    state: State
    if not plan.is_open and planned <= committed:
        state = "complete"
    elif plan.cancelled:
        state = "cancelled"
    else:
        state = "running" if busy or progress.state == "open" else "incomplete"
    if committed:
        seconds = totals.seconds(time.time() if progress.leased and state == "running" else 0.0)
    else:
        seconds = time.time() - progress.started if progress.leased and progress.started else 0.0
    return Status(
        run=run.uri,
        run_id=plan.run_id,
        state=state,
        planned=len(planned),
        committed=len(committed),
        total=max(progress.submitted, totals.sum("documents")) if plan.is_open else plan.documents,
        ok=totals.sum("ok"),
        rejected=totals.sum("rejected"),
        tokens=totals.sum("tokens"),
        computed_tokens=totals.sum("computed_tokens"),
        seconds=seconds,
        progress=progress,
        workers=totals.workers(),
        listening=listening,
        scores=scores_of(run),
    )


def _by_ledger(run: RunFolder, plan: Plan, progress: Progress, listening: tuple[WorkerProcess, ...]) -> Status:
    """The status of a run whose folder tells nothing yet, or not from here."""
    states: dict[str, State] = {"finished": "complete", "cancelled": "cancelled"}
    is_busy = progress.waiting or progress.leased or progress.state == "open"
    end = time.time() if progress.leased else progress.finished
    return Status(
        run=run.uri,
        run_id=plan.run_id,
        state=states.get(progress.state, "running" if is_busy else "incomplete"),
        planned=progress.planned,
        committed=progress.done,
        total=progress.submitted,
        ok=progress.ok,
        rejected=progress.rejected,
        tokens=progress.tokens,
        computed_tokens=progress.computed,
        seconds=max(0.0, end - progress.started) if progress.started else 0.0,
        progress=progress,
        listening=listening,
        scores=json.loads(progress.scores) if progress.scores else None,
    )


def part_stats(run: RunFolder, shard: int) -> list[dict[str, Any]]:
    """What workers measured for a committed part, from its footer alone: one entry a shard, more once compacted.

    Raises:
        StoreError: the part cannot be read.
    """
    with _footer(run, shard) as schema:
        return measurements(schema)


def artifact_of_parts(run: RunFolder) -> str:
    """sha256 of the artifact that made the run's parts; empty where there is none yet.

    Raises:
        StoreError: the part cannot be read.
    """
    committed = run.committed()
    if not committed:
        return ""
    with _footer(run, min(committed)) as schema:
        return metadata_of(schema)["artifact_sha256"]


@contextmanager
def _footer(run: RunFolder, shard: int) -> Iterator[pa.Schema]:
    """The schema of a committed part, with its metadata; what goes wrong inside is the part's damage."""

    name = part_name(shard)
    try:
        with open_part(run, shard) as part:
            yield part.schema_arrow
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{run.path(name)}: damaged part ({error}); remove it and nermill resume") from None
