"""One shard after another: lease, read, tag, commit the part, record it in the ledger; and a run's last step.

The part is committed before the ledger records it, and the ledger records it before Celery acknowledges the message,
so each step may be repeated and none can be skipped.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow as pa
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nermill.worker.contracts.by_value import Documents
from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.deadline import within
from nermill.worker.contracts.dispatch import Dispatcher
from nermill.worker.contracts.errors import (
    LeaseLostError,
    MessageError,
    NermillError,
    StoreError,
    UnreachableError,
    UsageError,
)
from nermill.worker.contracts.layout import PLAN_FILE, REJECT_FILE, SUCCESS_FILE, part_name
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import QUEUE, check_run, check_shard, queue_of
from nermill.worker.contracts.part import mark_complete, scores_of
from nermill.worker.contracts.plan import Shard, read_plan
from nermill.worker.contracts.records import MAX_ATTEMPTS, Claim, WorkerProcess
from nermill.worker.contracts.shard import read_shard
from nermill.worker.process import tracing
from nermill.worker.process.logs import about
from nermill.worker.process.metrics import Metrics
from nermill.worker.process.settings import Settings, is_allowed
from nermill.worker.queue import by_value
from nermill.worker.queue.poison import Isolation, annotate_in_trials
from nermill.worker.tagging import parts
from nermill.worker.tagging.pipeline import Annotated, Pipeline
from nermill.worker.tagging.pool import Job

log = logging.getLogger("nermill.worker")

RELEASE_SECONDS = 5.0  # for giving leases back when the process ends
FEEDERS = 2  # shards that are read and tokenized at once
SPARE_SHARE = 0.25  # of the concurrency, kept for shards of the common queue, which are mostly of small runs
LEDGER_PAUSE = 0.5  # seconds between two tries of a ledger that does not answer
LONGEST_PAUSE = 10.0  # seconds before a shard is given back whose store goes on failing
RECEIVED_SECONDS = 5.0  # a received message whose task has not begun by then is not counted any more
MAX_DEFECTS = 3  # errors that are no fault of a store, device or ledger, before the process ends
EVALUATION_SECONDS = 3600.0
EXIT_AGAIN = 75  # sysexits' EX_TEMPFAIL: start me again

T = TypeVar("T")
Outcome = dict[str, Any]


def outcome(state: str, reason: str = "", *, documents: int = 0, rejects: int = 0, tokens: int = 0) -> Outcome:
    """Result of ``nermill.tag_shard``; ``seconds`` is added by the caller."""
    return {"state": state, "reason": reason, "documents": documents, "rejects": rejects, "tokens": tokens}


_REASONS = {
    "unknown": "the ledger knows no such run or shard; nermill resume RUN makes it known again",
    "done": "its part is recorded already",
    "leased elsewhere": "another worker holds its lease",
    "cancelled": "the run is cancelled",
    "blocked": "the run is blocked; nermill status RUN says why, nermill resume RUN serves it again",
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
    """

    def __init__(
        self, pipeline: Pipeline, ledger: Ledger, dispatcher: Dispatcher, settings: Settings, metrics: Metrics
    ) -> None:
        manifest = pipeline.manifest
        self.pipeline = pipeline
        self.metrics = metrics
        self.identity = WorkerProcess(settings.worker_name, settings.device_name, manifest.name, manifest.sha256)
        self.queues = (QUEUE, queue_of(manifest.sha256))
        self.stopping = threading.Event()
        self.isolation = Isolation()
        self._ledger = ledger
        self._documents = Documents(ledger)
        self._dispatcher = dispatcher
        self._settings = settings
        self._held: dict[tuple[str, str], Claim] = {}
        self._jobs: dict[tuple[str, str], Job] = {}  # windows of the held shards that are on the device or wait for it
        self._received: dict[str, float] = {}  # task id and time of shard messages whose task has not begun
        self._tagging = 0  # tasks of shards that have begun
        self._feeding = 0  # shards that are being read and tokenized
        self._written = ("", 0.0)  # run and seconds of the last part that this process wrote
        self._faults: dict[tuple[str, str], int] = {}  # of the store, since the shard was last tagged
        self._defects = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> list[Claim]:
        """Shards that this process holds."""
        return list(self._held.values())

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

    # What Celery's consumer asks, in its own thread

    def received(self, task_id: str) -> None:
        """A shard's message was received; its task will begin in another thread."""
        self._received[task_id] = time.monotonic()

    def takes_common(self) -> bool:
        """Whether there is room for a shard of the common queue."""
        return self._underway() < self._settings.concurrency

    def takes_bound(self) -> bool:
        """Whether there is room for a shard of the artifact's queue, and the device will soon be idle."""
        concurrency = self._settings.concurrency
        room = concurrency - int(SPARE_SHARE * concurrency)
        with self._lock:
            feeding = self._feeding + len(self._received)
        return feeding < FEEDERS and self._underway() < room and self.pipeline.await_spare_capacity(0)

    def _underway(self) -> int:
        with self._lock:
            limit = time.monotonic() - RECEIVED_SECONDS
            self._received = {name: since for name, since in self._received.items() if since > limit}
            return len(self._received) + self._tagging

    # The tasks

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
        with ExitStack() as tagging, ExitStack() as feeding:
            with self._lock:
                self._received.pop(task_id, None)
                self._tagging += 1
                self._feeding += 1
            tagging.callback(self._tagged)
            feeding.callback(self._fed)
            with self.refusals():
                check_run(run_id, folder)
                check_shard(shard)
                claim = self._patiently(
                    lambda: self._ledger.lease(run_id, shard, self.identity, self._settings.lease_seconds)
                )
            if isinstance(claim, str):
                result = self._not_leased(claim, run_id, shard)
            else:
                self.metrics.leased(claim.attempts)
                self._promote()
                with about(run=run_id, shard=shard, attempt=claim.attempts):
                    result = self._serve(claim, feeding.close)
        return {**result, "seconds": round(time.monotonic() - began, 3)}

    def finish_run(self, run_id: Any, folder: Any) -> Outcome:
        """A run's last step: ``_SUCCESS``, and the evaluation where there is gold.

        Returns:
            ``state`` and ``reason``; ``scores`` where the run was evaluated.

        Raises:
            MessageError: arguments that do not fit.
        """
        with self.refusals():
            check_run(run_id, folder)
            claim = self._patiently(
                lambda: self._ledger.lease(run_id, None, self.identity, self._settings.lease_seconds)
            )
        if isinstance(claim, str):
            told = self._not_leased(claim, run_id, None)
            return {"state": told["state"], "reason": told["reason"]}
        with about(run=run_id, attempt=claim.attempts):
            return self._serve(claim, lambda: None)

    def _tagged(self) -> None:
        with self._lock:
            self._tagging -= 1

    def _fed(self) -> None:
        with self._lock:
            self._feeding -= 1

    def _not_leased(self, state: str, run_id: str, shard: int | None) -> Outcome:
        if state == "unable":
            self.stopping.wait(min(1.0, self._settings.lease_seconds / 3))  # another worker may receive it meanwhile
        if state in ("unable", "other artifact"):
            self._patiently(lambda: self._dispatcher.promote(self._ledger.queues()))
        log.debug("run %s shard %s: %s", run_id, shard, _REASONS[state])
        return outcome(state, _REASONS[state])

    def _promote(self) -> None:
        """Sends what is due; what cannot be sent now is found by recovery."""
        try:
            self._dispatcher.promote(self.queues)
        except (RedisError, OperationalError, OSError) as error:
            log.warning("messages that are due could not be sent (%s); recovery sends them", error)

    def _serve(self, claim: Claim, on_fed: Callable[[], object]) -> Outcome:
        key = (claim.run_id, claim.key)
        self._held[key] = claim
        try:
            self._check_roots(claim)
            with tracing.shard(claim):
                result = self._finish(claim) if claim.shard is None else self._tag(claim, claim.shard, on_fed)
            self._faults.pop(key, None)
            return result
        except (MessageError, UsageError) as error:
            self._ledger.quarantine(claim, str(error))
            self.metrics.refused()
            log.warning("run %s shard %s refused: %s", *key, error)
            return outcome("refused", str(error))
        except LeaseLostError:
            self.metrics.lost()
            log.warning("run %s shard %s went to another worker; its result is dropped", *key)
            return outcome("lease lost", "its lease ended, and another worker was given the shard")
        except StoreError as error:
            on_fed()
            return self._give_back(claim, error)
        except NermillError:
            self._ledger.release(claim)
            raise
        except (RedisError, OperationalError, OSError):
            raise
        except Exception:
            self._note_defect()
            raise
        finally:
            self._jobs.pop(key, None)
            if self._held.get(key) is claim:  # else its lease ran out, and another of our threads has it
                del self._held[key]

    def _give_back(self, claim: Claim, error: StoreError) -> Outcome:
        """Releases a shard whose store failed; one that is not to be seen from here is left to other workers."""
        key = (claim.run_id, claim.key)
        self.metrics.handed_back()
        log.error("run %s shard %s is given back, to be tried again: %s", *key, error)
        faults = self._faults[key] = self._faults.get(key, 0) + 1
        self.stopping.wait(min(self._settings.lease_seconds / 3, LONGEST_PAUSE, 2.0 ** min(faults - 2, 8)))
        self._ledger.release(claim, str(error))
        if isinstance(error, UnreachableError) and faults > 1:
            reason = f"{self.identity.name}: {error}"
            if self._ledger.unable(claim.run_id, self.identity.name, reason):
                log.error("run %s is blocked: no live worker can read its folder", claim.run_id)
        self._promote()
        return outcome("released", str(error))

    def _note_defect(self) -> None:
        """Counts an error that is no fault of a store, a device or the ledger; several end the process."""
        self.metrics.defect()
        self._defects += 1
        if self._defects >= MAX_DEFECTS:
            log.critical("%d unexpected errors; this process ends and is started again", self._defects, exc_info=True)
            os._exit(EXIT_AGAIN)

    def _patiently(self, call: Callable[[], T]) -> T:
        """The call's result, tried again while the ledger does not answer and the process does not stop."""
        answers = True
        while True:
            try:
                return call()
            except (RedisConnectionError, RedisTimeoutError, OperationalError) as error:
                if self.stopping.is_set():
                    raise
                if answers:
                    log.warning("the ledger does not answer (%s); it is tried again", error)
                answers = False
                self.stopping.wait(LEDGER_PAUSE)

    def _tag(self, claim: Claim, shard: Shard, on_fed: Callable[[], object]) -> Outcome:
        run, claimed = claim.folder, time.time()
        table = by_value.store(claim, shard, self._documents, self._patiently) if claim.packed else None
        if run.exists(name := part_name(shard.index)):
            run.sync(name)
            return self._record(claim, parts.read_committed(run, shard.index))
        if table is None:
            table = read_shard(run, shard.index, shard.sha256)
        if table.num_rows != shard.documents:
            raise MessageError(f"the ledger speaks of {shard.documents} documents, the shard has {table.num_rows}")
        read = time.time()
        annotated = self._annotate(claim, shard, table, on_fed)
        if time.monotonic() > claim.fresh_until and not self._patiently(
            lambda: self._ledger.renew(claim, self._settings.lease_seconds)
        ):
            raise LeaseLostError
        tagged = time.time()
        committed, is_ours = self._commit(claim, shard, claimed, annotated)
        done = time.time()
        self._written = claim.run_id, done - tagged
        if is_ours:
            self.metrics.committed(
                annotated, done - claimed, queue=claim.waited, read=read - claimed, write=done - tagged
            )
            tracing.committed(annotated)
        result = self._record(claim, committed)
        log.info("run %s shard %d: %d documents in %.2f s", claim.run_id, shard.index, table.num_rows, done - claimed)
        return result

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
            self._jobs[claim.run_id, claim.key] = job
            on_fed()

        if claim.attempts <= MAX_ATTEMPTS:
            with self.isolation.shared():
                return self.pipeline.annotate(table, claim.options, shard.first, note)
        with self.isolation.exclusive():
            return annotate_in_trials(self.pipeline, self._ledger, claim, shard, table)

    def _record(self, claim: Claim, committed: parts.Committed) -> Outcome:
        counts = asdict(committed)
        self._patiently(lambda: self._ledger.complete(claim, self.identity.name, **counts))
        self._promote()
        return outcome(
            "committed",
            documents=committed.ok + committed.rejected,
            rejects=committed.rejected,
            tokens=committed.tokens,
        )

    def _finish(self, claim: Claim) -> Outcome:
        """Every planned shard has its part, so says so, and evaluates what has gold tags."""
        run = claim.folder
        if not run.exists(PLAN_FILE):
            raise UnreachableError(f"{run.path(PLAN_FILE)}: not there, as seen from this worker")
        plan = read_plan(run)
        if plan.by_value:
            plan = by_value.close_plan(run, plan, self._documents, self._patiently)
        missing = {shard.index for shard in plan.shards} - run.committed()
        if missing or plan.is_open:
            self.metrics.refused()
            reason = f"{len(missing)} parts are missing: nermill resume {run.uri}"
            if plan.by_value:
                run.remove(SUCCESS_FILE)
                for shard in missing:
                    self._ledger.forget(claim.run_id, shard)
                reason += ", or submit the same input again"
            log.warning("run %s is not complete, %s", claim.run_id, reason)
            self._ledger.quarantine(claim, reason)
            return {"state": "incomplete", "reason": reason}
        mark_complete(run, sorted(shard.index for shard in plan.shards))
        run.remove_stale_files()
        log.info("run %s is complete", claim.run_id)
        reason = self._evaluate(claim) if plan.has_gold else ""
        scores = scores_of(run) if plan.by_value else None  # for producers that cannot read the folder
        self._patiently(lambda: self._ledger.close(claim.run_id, claim, json.dumps(scores) if scores else ""))
        return {"state": "complete", "reason": reason}

    def _evaluate(self, claim: Claim) -> str:
        """Writes the run's report in a process of its own, which does not hold this one's interpreter lock.

        Returns:
            Why there is no report; empty where there is one.
        """
        if claim.attempts > MAX_ATTEMPTS:
            reason = f"no report: {MAX_ATTEMPTS} attempts did not live to write it"
        else:
            reason = evaluate_apart(claim.uri)
        if reason:
            log.warning("run %s: %s", claim.run_id, reason)
        return reason

    # What runs beside the tasks

    def keep(self, stop: threading.Event) -> None:
        """Renews leases, recovers what others lost, and says that this process lives; returns when ``stop`` is set."""
        pause = min(self._settings.lease_seconds / 3, 5.0)
        stopping = False
        while not stopping:
            try:
                self._ledger.register(self.identity, 3 * pause)
                for claim in self.held:
                    job = self._jobs.get((claim.run_id, claim.key))
                    tokens = None if job is None else (job.tokens_done, len(job.tokens.ids))
                    self._ledger.renew(claim, self._settings.lease_seconds, tokens=tokens)
                recovered = self._dispatcher.recover(pause)
                self.metrics.ledger(recovered, *self._ledger.load())
            except (RedisError, OperationalError, OSError) as error:
                log.warning("the ledger does not answer (%s); leases are renewed as soon as it does", error)
            except Exception:
                log.exception("leases could not be renewed")
                self._note_defect()
            stopping = stop.wait(pause)
        try:
            self._ledger.register(self.identity, 0)
        except (RedisError, OSError):
            return  # its entry expires

    def watch(self, stop: threading.Event) -> None:
        """Ends the process when the device hangs or broke, so that its supervisor starts a new one."""
        while not stop.wait(1.0):
            if problem := self.problem():
                log.critical("%s; this process ends and is started again", problem)
                if self.pipeline.broken:  # a document that hangs the device must not go free: its attempt counts
                    self.release_all()
                os._exit(EXIT_AGAIN)

    def problem(self) -> str | None:
        """What is wrong with this process, for its health check; a busy device is not wrong."""
        if self.pipeline.broken:
            return str(self.pipeline.broken)
        hung = self.pipeline.busy_seconds()
        if hung > self._settings.hang_seconds:
            return f"the device has not answered for {hung:.0f} s"
        return None

    def release_all(self) -> bool:
        """Releases whatever is held and sends its messages again: another worker may begin it at once.

        Where the ledger does not answer, the leases run out instead: the caller is about to end the process.

        Returns:
            Whether the ledger answered, or nothing was held.
        """

        def release() -> None:
            held = self.held
            for claim in held:
                self._ledger.release(claim)
            if held:
                self._dispatcher.promote(self.queues)

        try:
            within(RELEASE_SECONDS, release)
        except (RedisError, OperationalError, OSError) as error:
            log.warning("the ledger does not answer (%s); what was held is tried again when its leases end", error)
            return False
        return True


def evaluate_apart(uri: str) -> str:
    """Evaluates a run in a new process; returns why there is no report, empty where there is one."""
    command: Sequence[str] = python_command("nermill.worker.evaluation", uri)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=EVALUATION_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no report: the evaluation took more than {EVALUATION_SECONDS:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"no report ({lines[-1] if lines else f'exit code {done.returncode}'})"
    return ""
