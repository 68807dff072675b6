"""Commands that bring documents in: run, plan, submit. Each is a ``RequestCommand``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from nermill.producer.commands import options as o
from nermill.producer.commands.outcome import (
    ensure_evaluated,
    exit_code_of_sent,
    go_on,
    report_status,
    say_left_out,
    told_how_to_go_on,
)
from nermill.producer.commands.streaming import stream
from nermill.producer.runs.queue import DEFAULT_BROKER, HIGH_WATER
from nermill.worker.contracts.errors import UsageError

if TYPE_CHECKING:
    from nermill.producer.runs.planning import Request
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.status import Status


def run(ctx: typer.Context, model: o.Model = "demo", devices: o.Devices = "auto", json: o.Json = False) -> int:
    """Run everything on this machine: broker, one worker a device, tables, scores where there is gold."""
    from nermill.producer.local.worker import local_worker
    from nermill.producer.runs.planning import make_plan
    from nermill.producer.runs.progress import reading, watching
    from nermill.producer.runs.run import is_complete, resume, wait
    from nermill.producer.runs.status import look
    from nermill.worker.contracts.device import parse_devices

    request: Request = ctx.obj
    parse_devices(devices)  # refused before anything is written
    with reading() as on_read:
        folder, plan = make_plan(request, on_read)
    say_left_out(plan.details.get("left_out", ()))
    if not is_complete(folder, plan):
        with told_how_to_go_on("the same command again"), local_worker(model, devices, folder.uri) as (queue, worker):

            def follow(status: Status) -> None:
                worker.check()
                show(status)

            with watching(own_worker=True) as show:
                plan = resume(folder, plan, queue)
                wait(folder, plan, queue, follow)
    ensure_evaluated(folder, plan)
    return report_status(look(folder, plan), as_json=json, with_hint=True)


def plan(
    ctx: typer.Context,
    out: Annotated[
        str, typer.Option("--out", metavar="OUT", envvar="NERMILL_OUT", help="Where the run would go.")
    ] = "",
    model: o.Model = "demo",
    costs: Annotated[
        str,
        typer.Option(
            "--costs", metavar="TABLE", help="A nermill-build bench --json, or a table's name, to estimate device time."
        ),
    ] = "",
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", metavar="PRICE", min=0, help="Of one device; gives the price of the run."),
    ] = None,
    json: o.Json = False,
) -> int:
    """Dry run: documents, shards, token lengths, duplicate ids, device time, price; sends and writes nothing."""
    from nermill.producer.entities.view import print_estimate, print_json
    from nermill.producer.runs.estimate import estimate
    from nermill.producer.runs.progress import reading

    with reading() as on_read:
        found = estimate(ctx.obj, costs, on_read, price_per_hour)
    say_left_out(found.left_out)
    if json:
        print_json(found.as_json())
    else:
        print_estimate(found)
    return 0


def submit(
    ctx: typer.Context,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="OUT",
            envvar="NERMILL_OUT",
            help="Folder or URI that holds runs; this one goes to OUT/run=<id>. With --resume: the one around RUN.",
        ),
    ] = "",
    broker: o.Broker = DEFAULT_BROKER,
    high_water: o.HighWater = HIGH_WATER,
    linger: Annotated[
        float,
        typer.Option(
            "--linger",
            metavar="SECONDS",
            envvar="NERMILL_LINGER",
            min=0,
            help="A stream: seconds a document waits at most.",
        ),
    ] = 1.0,
    ack: Annotated[
        bool,
        typer.Option(
            "--ack",
            help="A stream: print a JSON line for each shard once it is durable, tagged or not: run_id, index, first, "
            "documents, and byte and line of the input up to which nothing can be lost any more.",
        ),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Tail one growing JSONL file until Ctrl-C; started again, it goes on in its run."
        ),
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="A stream: go on in RUN. Give the same input from its beginning; what is durable is passed over.",
            show_default=False,
        ),
    ] = "",
    by_value: Annotated[
        bool,
        typer.Option(
            "--by-value",
            envvar="NERMILL_BY_VALUE",
            help="Send documents through the broker: OUT is as the workers see it, and need not be seen from here.",
        ),
    ] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Leave out files that a complete run below OUT had as an input (by sha256).")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", envvar="NERMILL_WAIT", help="Follow the run to its end.")] = False,
    json: o.Json = False,
) -> int:
    """Write a run's plan and send its shards to the workers; the same input again resumes its run.

    With - as the input, JSON lines are tagged as they come, until the end of input or Ctrl-C. A stream that was killed
    goes on behind the last durable line: --follow by itself, - with --resume RUN.
    With --by-value, documents travel through the broker, 1 MiB of them a shard at most, compressed; status and --wait
    ask the broker, and a stream's lines are durable once a worker has stored them.
    """
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.planning import find_inputs, make_plan, without_tagged
    from nermill.producer.runs.progress import counted, reading, say
    from nermill.producer.runs.queue import Queue
    from nermill.producer.sources.files import absolute

    request: Request = ctx.obj
    is_stream = follow or (request.inputs == ("-",) and request.read.format in (None, "jsonl"))
    if by_value and new:
        raise UsageError("--new looks at the runs below OUT, which --by-value does not see; leave one of them out")
    if new and is_stream:
        raise UsageError("--new knows files by their content, a stream has none yet; leave it out")
    if resume and not is_stream:
        raise UsageError("--resume goes on with a stream: nermill submit - --resume RUN; files: nermill resume RUN")
    if not resume and not out:
        raise UsageError("Missing option '--out'. See nermill --help.")
    if resume and out and absolute(resume).rpartition("/")[0] != absolute(out).rstrip("/"):
        raise UsageError(f"--resume {resume}: not below --out {out}; leave out --out")
    request = replace(request, by_value=by_value)
    if by_value and not is_stream:
        return _by_value(request, Queue(broker), wait=wait, as_json=json)
    found = find_inputs(request) if new else None
    if found is not None:
        files = len(found)
        found = without_tagged(request.out, found)
        say(f"{files - len(found):,} of {counted(files, 'file')} left out: complete runs below {request.out} have them")
        if not found:
            if json:
                print_json({"run": None, "files": {"new": 0, "left_out": files}})
            return 0
    queue = Queue(broker)
    if is_stream:
        return stream(
            request, queue, linger, high_water, follow=follow, resume=resume, ack=ack, wait=wait, as_json=json
        )
    with reading() as on_read:
        folder, plan = make_plan(request, on_read, found)
    say_left_out(plan.details.get("left_out", ()))
    return go_on(folder, plan, queue, high_water, wait=wait, as_json=json)


def _by_value(request: Request, queue: Queue, *, wait: bool, as_json: bool) -> int:
    from nermill.producer.runs import by_value
    from nermill.producer.runs import run as runs
    from nermill.producer.runs.progress import paused, reading, watching
    from nermill.producer.runs.status import look

    with ExitStack() as stack:
        with reading() as on_read:
            packed = stack.enter_context(by_value.packed(request, on_read))
        say_left_out(packed.plan.details.get("left_out", ()))
        with told_how_to_go_on("the same command again"), watching() as show:
            by_value.send(packed, queue, paused(show))
            if wait:
                runs.wait(packed.run, packed.plan, queue, show)
    code = report_status(look(packed.run, packed.plan, queue), as_json=as_json)
    return code if wait else exit_code_of_sent(packed.plan.details.get("rejected", 0), packed.run)
