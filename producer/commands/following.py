"""Commands that follow and steer runs: status, list, resume, rejects, cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer

from nermill.producer.commands import options as o
from nermill.producer.commands.outcome import go_on, report_status
from nermill.producer.runs.queue import DEFAULT_BROKER, HIGH_WATER
from nermill.worker.contracts.errors import BrokerError

if TYPE_CHECKING:
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.status import Status
    from nermill.worker.contracts.layout import RunFolder
    from nermill.worker.contracts.plan import Plan

WATCH_SECONDS = 1.0


def status(
    runs: o.Runs,
    broker: o.Broker = DEFAULT_BROKER,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second until the run ends.")] = False,
    json: o.Json = False,
) -> int:
    """Say how far a run is: committed, rejected, waiting, documents/s, tokens/s, padding, time left."""
    from nermill.producer.runs.by_value import open_seen_or_not

    queue, code = cache(lambda: _queue_if_any(broker)), 0
    for at, (folder, plan) in enumerate([open_seen_or_not(uri, queue) for uri in dict.fromkeys(runs)]):
        if at and not json:
            print()
        code = max(code, report_status(_current(folder, plan, queue, watch=watch), as_json=json))
    return code


def _current(folder: RunFolder, plan: Plan, find_queue: Callable[[], Queue | None], *, watch: bool) -> Status:
    """A run's status now, or at its end where it is watched; a complete one needs no queue."""
    from nermill.producer.runs.by_value import open_seen_or_not
    from nermill.producer.runs.progress import watching
    from nermill.producer.runs.status import PartTotals, look

    totals = PartTotals(folder)
    if not plan.is_followed_by_ledger:
        current = look(folder, plan, None, totals)
        if current.state == "complete":
            return current
    queue = find_queue()
    current = look(folder, plan, queue, totals)
    if watch:
        with watching() as show:
            while current.state == "running":
                show(current)
                time.sleep(WATCH_SECONDS)
                folder, plan = open_seen_or_not(folder.uri, find_queue)
                current = look(folder, plan, queue, totals)
    return current


def list_(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI that holds runs.", show_default=False)],
    broker: o.Broker = DEFAULT_BROKER,
    json: o.Json = False,
) -> int:
    """List the runs below a folder or URI: state, documents, when, model, F1 (--json: one object a line)."""
    from nermill.producer.entities.view import print_json, print_runs
    from nermill.producer.runs.listing import list_runs
    from nermill.producer.runs.progress import say

    asking = threading.Lock()
    ask = cache(lambda: _queue_if_any(broker))

    def find_queue() -> Queue | None:  # several threads look at runs; one says that nobody answers
        with asking:
            return ask()

    listed = list_runs(out, find_queue)
    if json:
        for entry in listed:
            print_json(entry.as_json())
    else:
        print_runs(listed)
    for entry in listed:
        if entry.message:
            say(entry.message)
    if not listed:
        say(f"{out}: no runs below it")
    return 0


def resume(
    runs: o.Runs,
    broker: o.Broker = DEFAULT_BROKER,
    high_water: o.HighWater = HIGH_WATER,
    wait: Annotated[bool, typer.Option("--wait", envvar="NERMILL_WAIT", help="Follow the run to its end.")] = False,
    json: o.Json = False,
) -> int:
    """Send again what has no part; safe at any time, any number of times."""
    from nermill.producer.runs.by_value import open_seen_or_not
    from nermill.producer.runs.queue import Queue

    find_queue = cache(lambda: Queue(broker))
    opened = [open_seen_or_not(uri, find_queue) for uri in dict.fromkeys(runs)]
    queue = find_queue()
    return max(go_on(folder, plan, queue, high_water, wait=wait, as_json=json) for folder, plan in opened)


def cancel(runs: o.Runs, broker: o.Broker = DEFAULT_BROKER, json: o.Json = False) -> int:
    """Stop what has not started; committed parts stay, and nermill resume takes the run up again."""
    from nermill.producer.runs.by_value import open_seen_or_not
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.run import cancel as cancel_run
    from nermill.producer.runs.status import look

    find_queue = cache(lambda: Queue(broker))
    opened = [open_seen_or_not(uri, find_queue) for uri in dict.fromkeys(runs)]
    queue = find_queue()
    for folder, plan in opened:
        report_status(look(folder, cancel_run(folder, plan, queue), queue), as_json=json)
    return 0


def rejects(
    runs: o.Runs,
    broker: o.Broker = DEFAULT_BROKER,
    retry: Annotated[bool, typer.Option("--retry", help="Send those again that failed in a worker.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Show that many of each run; default: all.")
    ] = None,
    json: o.Json = False,
) -> int:
    """List the documents that could not be tagged, with the reason (--json: one object a line)."""
    from itertools import islice

    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.progress import say
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.rejects import read_rejects
    from nermill.producer.runs.rejects import retry as retry_rejects
    from nermill.producer.runs.run import open_runs
    from nermill.worker.contracts.console import visible

    opened = open_runs(runs)
    if retry:
        queue = Queue(broker)
        tell = cache(lambda: say("somebody is at the run's last step; waiting for its end"))
        counts = [retry_rejects(folder, plan, queue, tell) for folder, plan in opened]
        again, hopeless, at_work = (sum(column) for column in zip(*counts, strict=True))
        told = f"; {hopeless} are not, their documents are at fault: correct and submit them" if hopeless else ""
        told += (
            f"; {at_work} are not, their shards wait or are at work: give the command again later" if at_work else ""
        )
        say(f"{again} rejects are tried again{told}")
        return 0
    row = None
    for folder, plan in opened:
        named = {"run": folder.uri} if len(opened) > 1 else {}
        for row in islice(read_rejects(folder, plan), limit):
            if json:
                print_json({**named, **row})
            else:
                print(visible(f"{row['doc_id']}  {row['reason']}: {row['message']}"))
    if row is None:
        say("no rejects so far")
    return 0


def _queue_if_any(broker: str) -> Queue | None:
    """The queue, or none where nobody answers: the folder alone knows most of it."""
    from nermill.producer.runs.progress import say
    from nermill.producer.runs.queue import Queue

    try:
        return Queue(broker)
    except BrokerError as error:
        say(f"{error}; counting the parts alone")
        return None
