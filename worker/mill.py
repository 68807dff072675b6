"""One claimed shard after another: read, tag, commit, tell the ledger; and the threads that keep the leases.

Whatever happens to a worker, the part is committed before the ledger hears of it and the ledger before the bell
is acknowledged, so each step may be repeated and none can be skipped.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from nermill.worker import parts, tracing
from nermill.worker.contracts.errors import LeaseLostError, MessageError, NermillError, StoreError, UsageError
from nermill.worker.contracts.layout import REJECT_FILE, part_name
from nermill.worker.contracts.ledger import FINISH, MAX_ATTEMPTS, Claim, Ledger, WorkerProcess
from nermill.worker.contracts.part import mark_complete
from nermill.worker.contracts.patience import within
from nermill.worker.contracts.plan import read_plan
from nermill.worker.contracts.shard import read_shard
from nermill.worker.evaluation import evaluate, write_report
from nermill.worker.gate import Gate
from nermill.worker.logs import about
from nermill.worker.metrics import Metrics
from nermill.worker.pipeline import Annotated, Pipeline
from nermill.worker.settings import Settings, is_allowed
from nermill.worker.suspects import annotate_in_trials

log = logging.getLogger("nermill.worker")

HAND_BACK_SECONDS = 5.0  # of a worker that has to go
FEEDERS = 0.25  # of the shards in the process, at least two: on their way to the device, the others on their way back
LEDGER_PAUSE = 0.5  # seconds between two looks at a ledger that does not answer
HUNGER_PAUSE = 0.5  # seconds between two looks at whether we leave, while the device has enough to do
LONGEST_PAUSE = 10.0  # seconds before a shard is handed back whose store goes on failing
EXIT_AGAIN = 75  # sysexits' EX_TEMPFAIL: start me again


class Mill:
    """What a worker process does for its bells.

    Args:
        pipeline: The model.
        ledger: Where work is claimed.
        settings: Leases, allowed roots, names.
        ring: Sends that many bells.
        metrics: What is counted.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        ledger: Ledger,
        settings: Settings,
        ring: Callable[[int], None],
        metrics: Metrics,
    ) -> None:
        self.pipeline = pipeline
        self._ledger = ledger
        self._settings = settings
        self._ring = ring
        self.metrics = metrics
        self._held: dict[tuple[str, int], Claim] = {}
        self._written = ("", 0.0)  # run and seconds of the last part that this process wrote
        self._faults: dict[tuple[str, int], int] = {}  # of the store, since the shard was last served
        self._gate = Gate()
        self._feeders = threading.Semaphore(max(2, round(FEEDERS * settings.concurrency)))

    @property
    def held(self) -> list[Claim]:
        """Shards that this process holds."""
        return list(self._held.values())

    def work(self, leaving: threading.Event) -> None:
        """Mills one shard after another until none is left for us, or we leave.

        A shard is claimed when the device will soon be idle, since until then another worker may begin on it.
        One bell is enough, since others may go to workers of another artifact. A ledger that does not answer is waited
        for: Celery could not acknowledge the bell, and a worker whose bells are not acknowledged is given no more.
        """
        answers = True
        while not leaving.is_set():
            try:
                with ExitStack() as feeding:
                    feeding.enter_context(self._feeders)
                    if not self._await_hunger(leaving) or not self.answer_bell(feeding.close):
                        return
                answers = True
            except (RedisConnectionError, RedisTimeoutError) as error:
                if answers:
                    log.warning("the ledger does not answer (%s); a shard that was in hand is tried again", error)
                answers = False
                leaving.wait(LEDGER_PAUSE)

    def _await_hunger(self, leaving: threading.Event) -> bool:
        """Waits until the device will soon be idle; False where it broke, or we leave."""
        while not self.pipeline.await_hunger(HUNGER_PAUSE) and not leaving.is_set():
            pass
        return not leaving.is_set() and not self.pipeline.broken

    def answer_bell(self, on_fed: Callable[[], object] = lambda: None) -> bool:
        """Claims a shard and mills it; False where there was none.

        A fault of the store hands the shard back for another try; an entry that makes no sense is buried; a fault
        of the device is raised.

        Args:
            on_fed: Called as soon as the shard's windows wait for the device, or will not for a while.
        """
        try:
            claim = self._ledger.claim(self.pipeline.manifest.sha256, self._settings.lease_seconds)
        except (MessageError, ResponseError) as error:
            self.metrics.refused()
            log.warning("%s", error)
            return False
        if claim is None:
            return False
        self.metrics.claimed(claim.attempts)
        with about(run=claim.run_id, shard=claim.shard.index, attempt=claim.attempts):
            self._serve(claim, on_fed)
        return True

    def _serve(self, claim: Claim, on_fed: Callable[[], object]) -> None:
        key = (claim.run_id, claim.shard.index)
        self._held[key] = claim
        try:
            with tracing.shard(claim):
                self._mill(claim, on_fed)
            self._faults.pop(key, None)
        except (MessageError, UsageError) as error:
            self._ledger.bury(claim, str(error))
            self.metrics.refused()
            log.warning("run %s shard %d refused: %s", claim.run_id, claim.shard.index, error)
        except LeaseLostError:
            self.metrics.lost()
            log.warning("run %s shard %d went to another worker; its result is dropped", *key)
        except StoreError as error:
            self.metrics.handed_back()
            log.error("run %s shard %d handed back, to be tried again: %s", claim.run_id, claim.shard.index, error)
            on_fed()
            faults = self._faults[key] = self._faults.get(key, 0) + 1
            time.sleep(min(self._settings.lease_seconds / 3, LONGEST_PAUSE, 2.0 ** min(faults - 2, 8)))
            self._ledger.release(claim, str(error))
        except NermillError:
            self._ledger.release(claim)
            raise
        finally:
            if self._held.get(key) is claim:  # else its lease ran out, and another of our threads has it
                del self._held[key]

    def _mill(self, claim: Claim, on_fed: Callable[[], object]) -> None:
        run, shard = claim.folder, claim.shard
        self._check_roots(claim)
        if shard.index == FINISH:
            on_fed()
            self._finish(claim)
            return
        if run.exists(part_name(shard.index)):
            self._complete(claim, parts.read_committed(run, shard.index))
            return
        claimed = time.time()
        table = read_shard(run, shard.index, shard.sha256)
        if table.num_rows != shard.documents:
            raise MessageError(f"the ledger speaks of {shard.documents} documents, the shard has {table.num_rows}")
        read = time.time()
        annotated = self._annotate(claim, table, on_fed)
        if time.monotonic() > claim.fresh_until and not self._ledger.renew(claim, self._settings.lease_seconds):
            raise LeaseLostError
        tagged = time.time()
        committed, is_ours = self._commit(claim, claimed, annotated)
        done = time.time()
        self._written = claim.run_id, done - tagged
        if is_ours:
            self.metrics.committed(
                annotated, done - claimed, queue=claim.waited, read=read - claimed, write=done - tagged
            )
            tracing.committed(annotated)
        self._complete(claim, committed)
        log.info("run %s shard %d: %d documents in %.2f s", claim.run_id, shard.index, table.num_rows, done - claimed)

    def _check_roots(self, claim: Claim) -> None:
        """Refuses a run whose folder, or what is in it, lies elsewhere once links and ``..`` are followed."""
        roots, run, shard = self._settings.roots, claim.folder, claim.shard.index
        places = [claim.uri]
        if is_allowed(claim.uri, roots) and run.is_local:
            places += [run.path(name) for name in (part_name(shard), run.shard_file(shard), REJECT_FILE)]
        for place in places:
            if not is_allowed(place, roots):
                raise MessageError(f"{place!r} is outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS")

    def _commit(self, claim: Claim, claimed: float, annotated: Annotated) -> tuple[parts.Committed, bool]:
        manifest = self.pipeline.manifest
        return parts.commit(
            claim.folder,
            claim.shard.index,
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

    def _annotate(self, claim: Claim, table: pa.Table, on_fed: Callable[[], object]) -> Annotated:
        if claim.attempts <= MAX_ATTEMPTS:
            with self._gate.shared():
                return self.pipeline.annotate(table, claim.options, claim.shard.first, on_fed)
        with self._gate.exclusive():
            return annotate_in_trials(self.pipeline, self._ledger, claim, table)

    def _complete(self, claim: Claim, committed: parts.Committed) -> None:
        if self._ledger.complete(claim, **asdict(committed)).last:
            self._ring(1)

    def _finish(self, claim: Claim) -> None:
        """The run's last step: every planned shard has its part, so say so, and evaluate what has gold tags."""
        run = claim.folder
        plan = read_plan(run)
        missing = {shard.index for shard in plan.shards} - run.committed()
        is_whole = not missing and not plan.is_open
        if is_whole:
            mark_complete(run, sorted(shard.index for shard in plan.shards))
            run.sweep()
            log.info("run %s is complete", claim.run_id)
            if plan.has_gold:
                self._evaluate(claim)
        else:  # nobody sends the last step before its time
            self.metrics.refused()
            log.warning("run %s is not complete, %d parts are missing: nermill resume it", claim.run_id, len(missing))
        self._ledger.complete(claim, ok=0, rejected=0, tokens=0, computed=0)
        if is_whole:
            self._ledger.close(claim.run_id)

    def _evaluate(self, claim: Claim) -> None:
        """Writes the run's report, unless that ended one process after the other."""
        if claim.attempts > MAX_ATTEMPTS:
            log.error("run %s: no report, %d attempts did not live to write it", claim.run_id, MAX_ATTEMPTS)
            return
        try:
            write_report(claim.folder, evaluate(claim.folder))
        except UsageError as error:
            log.warning("run %s: no report (%s)", claim.run_id, error)

    def keep(self, stop: threading.Event) -> None:
        """Renews leases, lets expired ones of others go, rings for what waits unheard, says that we live.

        Returns when ``stop`` is set.
        """
        settings, manifest = self._settings, self.pipeline.manifest
        myself = WorkerProcess(settings.worker_name, settings.device_name, manifest.name, manifest.sha256)
        pause = min(settings.lease_seconds / 3, 5.0)
        stopping = False
        while not stopping:
            try:
                self._ledger.greet(myself, 3 * pause)
                for claim in self.held:
                    self._ledger.renew(claim, self._settings.lease_seconds)
                expired, waiting = self._ledger.reap()
                self.metrics.ledger(expired, waiting)
                if waiting:
                    self._ring(waiting)
            except Exception as error:
                log.warning("the ledger does not answer (%s); leases are kept as soon as it does", error)
            stopping = stop.wait(pause)
        with suppress(RedisError):  # it is forgotten anyway
            self._ledger.greet(myself, 0)

    def watch(self, stop: threading.Event) -> None:
        """Ends the process when the device hangs or broke, so that its supervisor starts a fresh one."""
        while not stop.wait(1.0):
            if complaint := self.complaint():
                log.critical("%s; this process ends and is started again", complaint)
                if self.pipeline.broken:  # a document that hangs the device must not go free: its attempt counts
                    self.hand_back()
                os._exit(EXIT_AGAIN)

    def complaint(self) -> str | None:
        """What is wrong with this process, for its health check; a busy device is not wrong."""
        if self.pipeline.broken:
            return str(self.pipeline.broken)
        hung = self.pipeline.busy_seconds()
        if hung > self._settings.hang_seconds:
            return f"the device has not answered for {hung:.0f} s"
        return None

    def hand_back(self) -> bool:
        """Releases whatever is held: another worker may start on it at once.

        Where the ledger does not answer, the leases run out instead: whoever hands back is about to end.

        Returns:
            Whether the ledger answered, or nothing was held.
        """

        def release() -> None:
            for claim in self.held:
                self._ledger.release(claim)

        try:
            within(HAND_BACK_SECONDS, release)
        except (RedisError, OSError) as error:
            log.warning("the ledger does not answer (%s); what was held is tried again when its leases end", error)
            return False
        return True
