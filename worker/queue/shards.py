"""One message after another: its lease, then read, tag, commit the part and record it, or the run's last step.

The part is committed before the ledger records it, and the ledger records it before Celery acknowledges the message,
so each step may be repeated and none can be skipped.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import (
    LeaseLostError,
    MessageError,
    NermillError,
    StoreError,
    UnreachableError,
    UsageError,
)
from nermill.worker.contracts.layout import PLAN_FILE, REJECT_FILE, RunFolder, part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import check_run, check_shard
from nermill.worker.contracts.plan import Shard, read_plan
from nermill.worker.contracts.records import MAX_ATTEMPTS, Claim, WorkerProcess
from nermill.worker.contracts.shard import read_shard
from nermill.worker.process import tracing
from nermill.worker.process.logs import about
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings, is_allowed
from nermill.worker.queue import by_value
from nermill.worker.queue.capacity import Capacity
from nermill.worker.queue.finish import finish
from nermill.worker.queue.leases import Leases
from nermill.worker.queue.poison import Isolation, annotate_in_trials
from nermill.worker.queue.watchdog import Watchdog
from nermill.worker.tagging import parts
from nermill.worker.tagging.pipeline import Annotated, Pipeline
from nermill.worker.tagging.pool import Job

log = logging.getLogger("nermill.worker")

LONGEST_PAUSE = 10.0  # seconds before a shard is given back whose store goes on failing

Outcome = dict[str, Any]


def outcome(state: str, reason: str = "", *, documents: int = 0, rejects: int = 0, tokens: int = 0) -> Outcome:
    """Result of ``nermill.tag_shard``; ``seconds`` is added by the caller."""
    return {"state": state, "reason": reason, "documents": documents, "rejects": rejects, "tokens": tokens}


_REASONS = {
    "unknown": "the ledger knows no such run or shard; nermill resume RUN makes it known again",
    "done": "its part is recorded already",
    "leased elsewhere": "another worker holds its lease",
    "cancelled": "the run is cancelled",
    "blocked": "the run is blocked, its shard waits; nermill status RUN says why, nermill resume RUN serves it again",
    "quarantined": "the shard was refused; nermill status RUN says why, nermill resume RUN serves it again",
    "other artifact": "the run is bound to another artifact; its message went to that artifact's queue",
    "unable": "this worker could not read the run's folder a short time ago; the message was sent again",
    "not due": "the run is not complete, or its last step is done",
}


class ShardWorker:
    """What a worker process does for the messages that it receives.

    Args:
        pipeline: The model.
        ledger: Decides who tags what.
        dispatcher: Sends the messages that are due.
        settings: Leases, allowed roots, names.
        metrics: What is counted.

    Attributes:
        leases: What the process holds.
        capacity: Whether it takes another shard.
        watchdog: Ends it where it cannot work.
        isolation: Lets trials of a shard that ended its process run alone.
    """

    def __init__(
        self, pipeline: Pipeline, ledger: Ledger, dispatcher: Dispatcher, settings: Settings, metrics: Metrics
    ) -> None:
        manifest = pipeline.manifest
        identity = WorkerProcess(settings.worker_name, settings.device_name, manifest.name, manifest.sha256)
        self.pipeline = pipeline
        self.metrics = metrics
        self.leases = Leases(ledger, dispatcher, identity, settings.lease_seconds)
        self.capacity = Capacity(settings.concurrency, pipeline)
        self.watchdog = Watchdog(pipeline, settings.hang_seconds, metrics)
        self.isolation = Isolation()
        self._ledger = ledger
        self._documents = Documents(ledger)
        self._settings = settings
        self._written = ("", 0.0)  # run and seconds of the last part that this process wrote
        self._faults: dict[tuple[str, str], int] = {}  # of the store, since the shard was last tagged

    def refuse(self, reason: str) -> None:
        """Counts a message that does not fit the contract, and logs one line."""
        self.metrics.refused()
        log.warning("refused: %s", reason)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Refuses the message whose arguments, or whose entry in the ledger, do not fit; raises the MessageError."""
        try:
            yield
        except MessageError as error:
            self.refuse(str(error))
            raise

    def tag_shard(self, task_id: str, run_id: Any, folder: Any, shard: Any) -> Outcome:
        """Leases a shard and tags it.

        Args:
            task_id: Celery's id of the task.
            run_id, folder, shard: The message's arguments, unchecked.

        Returns:
            ``state`` (``committed`` where this call recorded the shard), ``reason``, ``documents``, ``rejects``,
            ``tokens``, ``seconds``.

        Raises:
            MessageError: arguments that do not fit.
            EngineError: the device failed; the process is about to end.
        """
        began = time.monotonic()
        with self.capacity.tagging(task_id) as fed:
            with self.refusals():
                check_run(run_id, folder)
                check_shard(shard)
                claim = self.leases.take(run_id, shard)
            if isinstance(claim, str):
                result = self._not_leased(claim, run_id, shard)
            else:
                self.metrics.leased(claim.attempts)
                with about(run=run_id, shard=shard, attempt=claim.attempts), ExitStack() as due:
                    due.callback(self.leases.promote)  # once the device has work, or where there is none
                    due.callback(fed)
                    result = self._serve(claim, due.close)
        return {**result, "seconds": round(time.monotonic() - began, 3)}

    def finish_run(self, run_id: Any, folder: Any) -> Outcome:
        """Leases a run's last step and does it; see ``finish``.

        Returns:
            ``state`` and ``reason``.

        Raises:
            MessageError: arguments that do not fit.
        """
        with self.refusals():
            check_run(run_id, folder)
            claim = self.leases.take(run_id, None)
        if isinstance(claim, str):
            told = self._not_leased(claim, run_id, None)
            return {"state": told["state"], "reason": told["reason"]}
        with about(run=run_id, attempt=claim.attempts):
            return self._serve(claim, lambda: None)

    def _not_leased(self, state: str, run_id: str, shard: int | None) -> Outcome:
        if state == "unable":
            self.leases.stopping.wait(min(1.0, self.leases.seconds / 3))  # another worker may receive it meanwhile
        if state in ("unable", "other artifact"):
            self.leases.promote_all()
        log.debug("run %s shard %s: %s", run_id, shard, _REASONS[state])
        return outcome(state, _REASONS[state])

    def _serve(self, claim: Claim, on_fed: Callable[[], object]) -> Outcome:
        with self.leases.hold(claim):
            try:
                return self._do(claim, on_fed)
            except (MessageError, UsageError) as error:
                self._ledger.quarantine(claim, str(error))
                self.metrics.refused()
                log.warning("run %s shard %s refused: %s", claim.run_id, claim.key, error)
                return outcome("refused", str(error))
            except LeaseLostError:
                self.metrics.lost()
                log.warning("run %s shard %s: its lease ended; the result is dropped", claim.run_id, claim.key)
                return outcome("lease lost", "its lease ended: another worker may have the shard, or it is not due")
            except StoreError as error:
                on_fed()
                return self._give_back(claim, error)
            except NermillError:
                self._ledger.release(claim)
                raise
            except (RedisError, OperationalError, OSError):
                raise
            except Exception:
                self.watchdog.note_defect()
                raise

    def _do(self, claim: Claim, on_fed: Callable[[], object]) -> Outcome:
        self._check_roots(claim)
        with tracing.shard(claim):
            if claim.shard is None:
                result = finish(claim, self.leases, self._documents, self.metrics)
            else:
                result = self._tag(claim, claim.shard, on_fed)
        self._faults.pop((claim.run_id, claim.key), None)
        return result

    def _give_back(self, claim: Claim, error: StoreError) -> Outcome:
        """Releases a shard whose store failed; one that is not to be seen from here is left to other workers."""
        key = (claim.run_id, claim.key)
        self.metrics.handed_back()
        log.error("run %s shard %s is given back, to be tried again: %s", *key, error)
        faults = self._faults[key] = self._faults.get(key, 0) + 1
        self.leases.stopping.wait(min(self.leases.seconds / 3, LONGEST_PAUSE, 2.0 ** min(faults - 2, 8)))
        self._ledger.release(claim, str(error))
        if isinstance(error, UnreachableError) and faults > 1:
            name = self._settings.worker_name
            if self._ledger.unable(claim.run_id, name, f"{name}: {error}"):
                log.error("run %s is blocked: no live worker can read its folder", claim.run_id)
        self.leases.promote()
        return outcome("released", str(error))

    def _tag(self, claim: Claim, shard: Shard, on_fed: Callable[[], object]) -> Outcome:
        run, claimed = claim.folder, time.time()
        table = by_value.store(claim, shard, self._documents, self.leases.patiently) if claim.packed else None
        if run.exists(name := part_name(shard.index)):
            run.sync(name)
            return self._record(claim, parts.read_committed(run, shard.index))
        if table is None:
            table = read_shard(run, shard.index, shard.sha256)
        if table.num_rows != shard.documents:
            raise MessageError(f"the ledger speaks of {shard.documents} documents, the shard has {table.num_rows}")
        read = time.time()
        annotated = self._annotate(claim, shard, table, on_fed)
        self._check_lease(claim)
        tagged = time.time()
        committed, is_ours = self._commit(claim, shard, claimed, annotated)
        done = time.time()
        if is_ours:
            try:
                self._check_lease(claim)
            except LeaseLostError:
                if self._is_compacted(run, shard):  # its documents are in another part
                    run.remove(name)
                    raise
        self._written = claim.run_id, done - tagged
        if is_ours:
            self.metrics.committed(
                annotated, done - claimed, queue=claim.waited, read=read - claimed, write=done - tagged
            )
            tracing.committed(annotated)
        result = self._record(claim, committed)
        log.info("run %s shard %d: %d documents in %.2f s", claim.run_id, shard.index, table.num_rows, done - claimed)
        return result

    def _check_lease(self, claim: Claim) -> None:
        if time.monotonic() > claim.fresh_until:
            self.leases.prove(claim)

    @staticmethod
    def _is_compacted(run: RunFolder, shard: Shard) -> bool:
        """Whether the shard was joined with others into a new one."""
        plan = read_plan(run)
        return "compacted" in plan.details and shard.index not in {planned.index for planned in plan.shards}

    def _check_roots(self, claim: Claim) -> None:
        """Refuses a run whose folder, or what is in it, lies elsewhere once links and ``..`` are followed."""
        roots, run = self._settings.roots, claim.folder
        places = [claim.uri]
        if is_allowed(claim.uri, roots) and run.is_local:
            names = [PLAN_FILE, REJECT_FILE]
            if claim.shard is not None:
                names += [part_name(claim.shard.index), run.shard_file(claim.shard.index)]
            places += map(run.path, names)
        for place in places:
            if not is_allowed(place, roots):
                raise MessageError(f"{place!r} is outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS")

    def _commit(self, claim: Claim, shard: Shard, claimed: float, annotated: Annotated) -> tuple[parts.Committed, bool]:
        manifest = self.pipeline.manifest
        return parts.commit(
            claim.folder,
            shard.index,
            annotated.part,
            metadata={
                "run_id": claim.run_id,
                "model": manifest.name,
                "artifact_sha256": manifest.sha256,
                "aggregation": claim.options.aggregation,
            },
            stats=self._stats(claim, claimed, annotated),
        )

    def _stats(self, claim: Claim, claimed: float, annotated: Annotated) -> dict[str, Any]:
        run_written, write_seconds = self._written  # a part cannot hold its own time: that of the part before
        return {
            **asdict(annotated.stats),
            **({"write_seconds": write_seconds} if run_written == claim.run_id else {}),
            "queue_seconds": claim.waited,
            "device": self._settings.device_name,
            "worker": self._settings.worker_name,
            "host": socket.gethostname(),
            "claimed": claimed,
            "finished": time.time(),
            "attempts": claim.attempts,
        }

    def _annotate(self, claim: Claim, shard: Shard, table: pa.Table, on_fed: Callable[[], object]) -> Annotated:
        def note(job: Job) -> None:
            self.leases.note(claim, job)
            on_fed()

        if claim.attempts <= MAX_ATTEMPTS:
            with self.isolation.shared():
                return self.pipeline.annotate(table, claim.options, shard.first, note)
        self.leases.promote()  # not after trials, which take long
        with self.isolation.exclusive():
            return annotate_in_trials(self.pipeline, self._ledger, claim, shard, table)

    def _record(self, claim: Claim, committed: parts.Committed) -> Outcome:
        counts = asdict(committed)
        completion = self.leases.patiently(lambda: self._ledger.complete(claim, self._settings.worker_name, **counts))
        if completion.last:
            self.leases.promote()
        return outcome(
            "committed",
            documents=committed.ok + committed.rejected,
            rejects=committed.rejected,
            tokens=committed.tokens,
        )
