"""A run on its way: sent, followed, resumed, cancelled; every step may be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from nermill.producer.runs.queue import HIGH_WATER, Queue
from nermill.producer.runs.recovery import finish_swap, recover, recover_by_value
from nermill.producer.runs.status import PartTotals, Status, artifact_of_parts, look
from nermill.producer.sources.files import absolute, suggestion
from nermill.worker.contracts.errors import BrokerError, LeaseLostError, StoreError, UsageError
from nermill.worker.contracts.layout import (
    FIRST_LAYOUT,
    PLAN_FILE,
    REJECT_FILE,
    REPORT_HTML,
    REPORT_JSON,
    SUCCESS_FILE,
    RunFolder,
    part_name,
)
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import PRIORITIES
from nermill.worker.contracts.part import mark_complete
from nermill.worker.contracts.plan import Plan, Shard, read_plan
from nermill.worker.contracts.records import Claim, Progress, RunState, WorkerProcess

MAX_WAITING_SHARDS = 100_000  # about 120 MB in the broker
BROKER_TIMEOUT = 120.0  # seconds without a broker before a waiting producer gives up
SETTLE_SECONDS = 30.0  # for a worker to begin the run's last step: _SUCCESS and evaluation
_BATCH = 64  # shards sent between two looks at the high-water mark
_POLL_SECONDS = (0.1, 1.0)
_PRODUCER = WorkerProcess("producer", "", "", "")  # who holds the last step of a run that no worker ends
_FINISH_SECONDS = 60.0  # how long it is held, if this process is killed meanwhile
_LONGEST_PAUSE = 5.0  # after a look that lasted: of a slow store, or over a network that was cut

OnStatus = Callable[[Status], None]
SendAgain = Callable[[], object]


def ignore(_: Status) -> None:
    """For those who do not watch."""


def open_run(uri: str) -> tuple[RunFolder, Plan]:
    """A run that was planned before.

    Raises:
        UsageError: there is none, or its plan is damaged.
    """
    run = RunFolder(absolute(uri))
    if not run.exists(PLAN_FILE):
        finish_swap(run)
    if not run.exists(PLAN_FILE) and not run.exists(FIRST_LAYOUT):
        if inside := [name for name in run.list() if name.startswith("run=")]:
            names = ", ".join(f"{run.uri}/{name}" for name in inside[:5])
            raise UsageError(f"{run.uri}: a folder of runs, not a run; name one: {names}")
        if meant := suggestion(run.uri):
            raise UsageError(f"{run.uri}: no run here{meant}")
    return run, read_plan(run)


def open_runs(uris: Iterable[str]) -> list[tuple[RunFolder, Plan]]:
    """Several runs that were planned before; nothing is done to any where one is wrong.

    Raises:
        UsageError: one is not there, or its plan is damaged.
    """
    return [open_run(uri) for uri in dict.fromkeys(uris)]


def send(run: RunFolder, plan: Plan, queue: Queue, high_water: int = HIGH_WATER, on_wait: OnStatus = ignore) -> int:
    """Sends the shards that have no part; those that wait or are at work already are left alone.

    Where all parts are there and the run's report is not, workers make it: the run's last step is due again.

    Args:
        run: The run's folder.
        plan: Its plan.
        queue: Where to.
        high_water: Unfinished documents above which sending pauses, so that the broker does not fill.
        on_wait: Told the status while it pauses.

    Returns:
        Shards that newly wait for a worker.

    Raises:
        UsageError: a shard's documents are gone.
        BrokerError: the broker does not answer.
    """
    # Parts are listed last: one that is recorded, or that the mark speaks for, and is not there was taken away.
    is_marked = run.exists(SUCCESS_FILE)
    with queue.ledger() as ledger:
        done = ledger.done(plan.run_id)
    committed = run.committed()
    missing = [shard for shard in plan.shards if shard.index not in committed]
    _check_documents(run, missing)
    lacks_report = not missing and _lacks_report(run, plan)
    run.sync(PLAN_FILE)
    with queue.ledger() as ledger:
        if plan.details.get("compacted") and done - {shard.index for shard in plan.shards}:
            queue.drop(plan.run_id)  # it knows the shards of before
            done = set()
        open_ledger(ledger, run, plan)
        for shard in done - committed:
            ledger.forget(plan.run_id, shard)
    totals = PartTotals(run)
    if missing and is_marked:
        state = RunState.OPEN if plan.is_open else RunState.CLOSED
        queue.reopen(plan.run_id, state, lambda: on_wait(look(run, plan, queue, totals)))
        unmark(run)
    if not missing and not lacks_report:
        finish(run, plan, queue)
        return 0
    # workers record the parts that they find; the report is due when all are recorded
    unrecorded = [shard for shard in plan.shards if shard.index not in done] if lacks_report else missing
    sent = 0
    for at in range(0, len(unrecorded), _BATCH):
        while at and is_above(queue, plan, high_water):
            on_wait(look(run, plan, queue, totals))
            time.sleep(_POLL_SECONDS[1])
        sent += send_shards(queue, plan, unrecorded[at : at + _BATCH])
    if not plan.is_open:
        queue.seal(plan.run_id)  # where workers recorded all of it meanwhile
    return sent


def resume(run: RunFolder, plan: Plan, queue: Queue, high_water: int = HIGH_WATER, on_wait: OnStatus = ignore) -> Plan:
    """Sends again what has no part; a cancelled run is taken up again, an abandoned stream is closed.

    Raises:
        UsageError: the run goes by value and is not complete: its documents may not be here.
    """
    if plan.is_followed_by_ledger and plan.is_stream:
        return recover_by_value(run, plan, queue)
    if plan.is_followed_by_ledger:
        raise UsageError(f"{run.uri}: its documents come through the broker; to go on, submit the same input again")
    run.remove_stale_files()
    if not run.is_local:
        from nermill.producer.runs.compact import finish_interrupted_swap

        finish_interrupted_swap(run)
    while not (plan := read_plan(run)).is_open and queue.has_producer(plan.run_id):
        pass  # it goes on with a stream, or takes parts away to try rejects again
    if plan.is_open:
        plan = recover(run, plan, queue)
    if plan.cancelled:
        plan = replace(plan, cancelled=False)
        plan.write(run)
    send(run, plan, queue, high_water, on_wait)
    return plan


def wait(
    run: RunFolder, plan: Plan, queue: Queue, on_status: OnStatus = ignore, send_again: SendAgain | None = None
) -> Status:
    """Follows a run to its end, and repairs what was lost on the way: shards that nobody knows are sent again.

    Args:
        run: The run's folder, which is not looked at where the ledger alone tells how far the run is.
        plan: Its plan.
        queue: Its broker; while it is away the run's folder is watched alone.
        on_status: Told the status at each look; what it raises ends the waiting.
        send_again: Called where nobody is at work and shards are missing; default: sends those that lie in the run's
            folder, and refuses for a run that is followed by the ledger.

    Returns:
        The last status: complete or cancelled.

    Raises:
        BrokerError: the broker stays away, or lost a run by value.
        StoreError: workers refuse the run, the folder cannot be read, or not all of a run by value was sent.
    """
    by_ledger, totals = plan.is_followed_by_ledger, PartTotals(run)
    pause, is_idle, answered, complete_since = _POLL_SECONDS[0], False, time.monotonic(), 0.0
    while True:
        began, was_idle, status = time.monotonic(), is_idle, None
        try:
            if is_known := not by_ledger or queue.knows(plan.run_id):
                status = look(run, plan, queue, totals)
            answered = began
        except BrokerError:
            if began - answered > BROKER_TIMEOUT:
                raise
            is_known = True
            if not by_ledger:
                status = look(run, plan, None, totals)
        if answered == began:
            with suppress(BrokerError):
                queue.recover()
        is_idle = not is_known
        if status is not None:
            on_status(status)
            is_working = _is_busy(status.progress)
            if status.state == "complete":
                if by_ledger:
                    return status
                complete_since = complete_since or began
                is_settled = began - complete_since > SETTLE_SECONDS
                if answered != began:
                    if run.exists(SUCCESS_FILE):
                        return status
                elif not is_working or (is_settled and not status.progress.leased):
                    if (last := _last(run, plan, queue)) is not None:
                        return last
                    plan = read_plan(run)  # which somebody else may have changed
                    if is_settled:
                        _check_parts(run, plan)
            else:
                complete_since = 0.0
            if status.state == "cancelled" and not status.progress.leased:
                return status
            check_served(run, plan, status.progress)
            is_idle = not is_working and status.state not in ("complete", "cancelled")
        if is_idle and was_idle and answered == began:
            if send_again is not None:
                send_again()
            elif by_ledger:
                raise not_all_sent(run) if is_known else lost(run)
            else:
                plan = read_plan(run)  # which somebody else may have cancelled
                if not plan.cancelled:
                    send(run, plan, queue)
        pause = min(_POLL_SECONDS[1], pause * 1.2)
        time.sleep(max(pause, min(_LONGEST_PAUSE, 5 * (time.monotonic() - began))))


def _last(run: RunFolder, plan: Plan, queue: Queue) -> Status | None:
    """The last status of a complete run at which nobody works; None where it is not marked yet, or was changed."""
    with suppress(BrokerError):
        if finish(run, plan, queue) and (last := look(run, plan, None)).state == "complete":
            return last
    return None


def _check_parts(run: RunFolder, plan: Plan) -> None:
    """Looks for parts that are not the run's.

    Raises:
        StoreError: there are some, so that the run is not marked: who lists its folder would read them.
    """
    more = run.committed() - {shard.index for shard in plan.shards}
    if more and not plan.is_open:
        names = ", ".join(part_name(shard) for shard in sorted(more)[:5])
        raise StoreError(f"{run.uri}: {names}: not named by its plan; take them away, then nermill resume {run.uri}")


def check_served(run: RunFolder, plan: Plan, progress: Progress) -> None:
    """Looks whether the workers serve a run.

    Raises:
        StoreError: they refuse it.
    """
    refused = progress.blocked or (progress.quarantined and not progress.waiting)
    if refused and not progress.leased:
        is_sent_again = plan.is_followed_by_ledger and not plan.is_stream
        way = "submit the same input again" if is_sent_again else f"nermill resume {run.uri}"
        raise StoreError(f"{run.uri}: the workers refuse it ({progress.last_error}); once that is corrected: {way}")


def lost(run: RunFolder) -> BrokerError:
    """What is raised where the broker does not know a run by value any more."""
    return BrokerError(f"{run.uri}: the broker lost the run; submit the same input again, which goes on")


def not_all_sent(run: RunFolder) -> StoreError:
    """What is raised where a run by value waits for documents that nobody sends."""
    return StoreError(f"{run.uri}: not all of its documents were sent; submit the same input again")


def is_whole(run: RunFolder, plan: Plan) -> bool:
    """Whether all parts of a run are there; and no more, as while it is compacted, unless it is marked."""
    if plan.is_open:
        return False
    more = run.committed() ^ (planned := {shard.index for shard in plan.shards})
    return not more or (not more & planned and run.exists(SUCCESS_FILE))


def is_complete(run: RunFolder, plan: Plan) -> bool:
    """Whether all parts of a run are there, and ``_SUCCESS``."""
    return is_whole(run, plan) and run.exists(SUCCESS_FILE)


def finish(run: RunFolder, plan: Plan, queue: Queue) -> bool:
    """Does what is left of the last step of a run whose parts are all there: ``_SUCCESS``, without an evaluation.

    It is leased, as it is for a worker: nobody else marks the run, or takes its marks away, meanwhile.

    Returns:
        False where parts are missing, shards may still come, or somebody else does the last step.
    """
    if not is_whole(run, plan) or queue.has_producer(plan.run_id):
        return False
    with queue.ledger() as ledger:
        progress = ledger.progress(plan.run_id)
        if progress.state == RunState.FINISHED and run.exists(SUCCESS_FILE):
            run.sync(SUCCESS_FILE)
            return True
        if progress.state == "unknown":
            open_ledger(ledger, run, plan)
        claim = ledger.lease(plan.run_id, None, _PRODUCER, _FINISH_SECONDS, is_whole=True)
        if not isinstance(claim, Claim):
            return False
        is_marked = False
        try:
            is_marked = _mark(run, claim, ledger) and ledger.close(plan.run_id, claim)
        finally:
            if not is_marked:
                ledger.release(claim)
    return is_marked


def _mark(run: RunFolder, claim: Claim, ledger: Ledger) -> bool:
    """Writes ``_SUCCESS`` of a run whose last step is leased, unless the run was changed before that."""

    def before_write() -> None:
        if not ledger.renew(claim, _FINISH_SECONDS):
            raise LeaseLostError
        for name in (REPORT_JSON, REPORT_HTML):  # of the parts of before
            run.remove(name)

    plan = read_plan(run)
    if not is_whole(run, plan):
        return False
    try:
        mark_complete(run, sorted(shard.index for shard in plan.shards), before_write)
    except LeaseLostError:
        return False
    return True


def unmark(run: RunFolder) -> None:
    """Removes what the last step wrote. The caller has reopened the run, see ``Queue.reopen``."""
    for name in (SUCCESS_FILE, REPORT_JSON, REPORT_HTML, REJECT_FILE):
        run.remove(name)


def cancel(run: RunFolder, plan: Plan, queue: Queue) -> Plan:
    """Stops what has not started; committed parts stay, and so does what a worker holds at this moment."""
    if is_whole(run, plan):
        finish(run, plan, queue)
        return plan
    cancelled = replace(plan, cancelled=True) if plan.is_followed_by_ledger else plan.cancel(run)
    with queue.ledger() as ledger:
        ledger.cancel(plan.run_id)
    return cancelled


def open_ledger(ledger: Ledger, run: RunFolder, plan: Plan) -> None:
    """Makes a run known to the ledger, or known again: bound to the artifact of its parts, if it has any."""
    state = RunState.OPEN if plan.is_open else RunState.CLOSED
    artifact = plan.model["sha256"] or artifact_of_parts(run)
    ledger.open(plan.run_id, run.uri, plan.options, artifact=artifact, state=state, priority=PRIORITIES[plan.priority])


def send_shards(queue: Queue, plan: Plan, shards: Iterable[Shard]) -> int:
    """Makes shards pending and sends the messages that are due; returns how many shards are new."""
    with queue.ledger() as ledger:
        added = ledger.add(plan.run_id, shards)
    queue.promote()
    return added


def is_above(queue: Queue, plan: Plan, high_water: int) -> bool:
    """Whether so much of a run waits that its producer should wait too."""
    with queue.ledger() as ledger:
        progress = ledger.progress(plan.run_id)
    return is_much(progress, high_water)


def is_much(progress: Progress, high_water: int) -> bool:
    """Whether a run's producer should wait."""
    return progress.unfinished_documents > high_water or progress.waiting > MAX_WAITING_SHARDS


def _is_busy(progress: Progress) -> bool:
    return bool(progress.waiting or progress.leased)


def _lacks_report(run: RunFolder, plan: Plan) -> bool:
    """Whether workers have to evaluate a run whose parts are all there."""
    if plan.is_open or not plan.has_gold:
        return False
    if not run.exists(REPORT_JSON):
        return True
    run.sync(REPORT_JSON)
    return False


def _check_documents(run: RunFolder, shards: list[Shard]) -> None:
    gone = {shard.index for shard in shards} - run.shards() if shards else set()
    if gone:
        raise UsageError(
            f"{run.path(run.shard_file(min(gone)))}: these documents are gone; submit the same input again"
        )
