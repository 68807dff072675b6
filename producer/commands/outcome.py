"""How commands end: the report on standard output, the exit code, the way on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nermill.worker.contracts.errors import NermillError
from nermill.worker.contracts.layout import REPORT_JSON

REJECTS = 3  # finished with rejects, or not complete

if TYPE_CHECKING:
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.status import Status
    from nermill.worker.contracts.layout import RunFolder
    from nermill.worker.contracts.plan import Plan


def report_status(status: Status, *, as_json: bool, with_hint: bool = False) -> int:
    """Prints a run's status; returns the exit code that it means."""
    from nermill.producer.entities.view import print_json, print_result_hint, print_status

    if as_json:
        print_json(status.as_json())
    else:
        print_status(status)
        if with_hint:
            print_result_hint(status.run)
    return status.exit_code


def say_left_out(files: Iterable[str]) -> None:
    """Names, on standard error, the files that a folder or pattern led to and that are not read."""
    from nermill.producer.runs.progress import say

    for file in files:
        say(f"left out: {file}")


def ensure_evaluated(run: RunFolder, plan: Plan) -> None:
    """Scores a complete run against the gold tags of its documents, unless a worker did so already.

    What the scores do not show, such as labels that gold and model do not share, is said on standard error.
    """
    if not plan.has_gold:
        return
    from nermill.producer.runs.progress import counting, say
    from nermill.worker.evaluation import evaluate, write_report

    if not run.exists(REPORT_JSON):
        with counting("evaluating", "documents") as on_documents:
            report = evaluate(run, on_documents=on_documents)
        if not run.exists(REPORT_JSON):  # else a worker made it meanwhile, perhaps of other parts
            write_report(run, report)
    for line in json.loads(run.read(REPORT_JSON))["warnings"]:
        say(line)


def go_on(run: RunFolder, plan: Plan, queue: Queue, high_water: int, *, wait: bool, as_json: bool) -> int:
    """Sends what has no part, follows it where asked, and reports; returns the exit code."""
    from nermill.producer.runs import run as runs
    from nermill.producer.runs.progress import paused, watching
    from nermill.producer.runs.status import look

    with told_how_to_go_on(f"nermill resume {run.uri}"), watching() as show:
        if was_complete := runs.finish(run, plan, queue):
            ensure_evaluated(run, plan)  # before workers are asked to
        plan = runs.resume(run, plan, queue, high_water, paused(show))
        if wait and runs.wait(run, plan, queue, show).state == "complete" and not was_complete:
            ensure_evaluated(run, plan)
    code = report_status(look(run, plan, queue), as_json=as_json)
    return code if wait else exit_code_of_sent(plan.details.get("rejected", 0), run)


def exit_code_of_sent(rejected: int, run: RunFolder) -> int:
    """The exit code where nobody waits for the workers: that of rejects where some are known already."""
    from nermill.producer.runs.progress import counted, say

    if rejected:
        say(f"{counted(rejected, 'document')} rejected as unreadable: nermill rejects {run.uri}")
    return REJECTS if rejected else 0


@contextmanager
def told_how_to_go_on(how: str) -> Iterator[None]:
    """Says after Ctrl-C or a failure what stays and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, NermillError):
        from nermill.producer.runs.progress import say

        say(f"stopped; what is committed stays. To go on: {how}")
        raise
