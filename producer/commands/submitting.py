"""Commands that bring documents in: run, submit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nermill.producer.commands import options as o
from nermill.producer.commands.outcome import ensure_evaluated, go_on, report_status, say_left_out, told_how_to_go_on
from nermill.producer.commands.request import takes_request
from nermill.producer.commands.streaming import stream
from nermill.producer.runs.queue import DEFAULT_BROKER, HIGH_WATER
from nermill.worker.contracts.errors import UsageError

if TYPE_CHECKING:
    from nermill.producer.runs.planning import Request
    from nermill.producer.runs.status import Status


@takes_request
def run(request: Request, model: o.Model = "demo", devices: o.Devices = "auto", json: o.Json = False) -> int:
    """Run the whole mill on this machine: broker, a worker a device, tables, scores where there is gold."""
    from nermill.producer.local.worker import check_devices, local_mill
    from nermill.producer.runs.planning import make_plan
    from nermill.producer.runs.progress import reading, watching
    from nermill.producer.runs.run import finish, resume, wait
    from nermill.producer.runs.status import look

    check_devices(devices)
    with reading() as on_read:
        folder, plan = make_plan(request, on_read)
    say_left_out(plan.details.get("left_out", ()))
    if not finish(folder, plan):
        with told_how_to_go_on("the same command again"), local_mill(model, devices, folder.uri) as (queue, worker):

            def follow(status: Status) -> None:
                worker.check()
                show(status)

            with watching(own_worker=True) as show:
                plan = resume(folder, plan, queue)
                wait(folder, plan, queue, follow)
    ensure_evaluated(folder, plan)
    return report_status(look(folder, plan), as_json=json, with_hint=True)


@takes_request
def plan(
    request: Request,
    out: Annotated[
        str, typer.Option("--out", metavar="OUT", envvar="NERMILL_OUT", help="Where the run would go.")
    ] = "",
    model: o.Model = "demo",
    costs: Annotated[
        Path | None,
        typer.Option("--costs", metavar="FILE", help="A nermill-build bench --json, to estimate device time."),
    ] = None,
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
        found = estimate(request, costs, on_read, price_per_hour)
    say_left_out(found.left_out)
    if json:
        print_json(found.as_json())
    else:
        print_estimate(found)
    return 0


@takes_request
def submit(
    request: Request,
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
    ack: Annotated[bool, typer.Option("--ack", help="A stream: print a JSON line for each durable shard.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Tail one growing JSONL file until Ctrl-C.")] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Leave out files that a complete run below OUT had as an input (by sha256).")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", envvar="NERMILL_WAIT", help="Follow the run to its end.")] = False,
    json: o.Json = False,
) -> int:
    """Write a run's plan and send its shards to the workers; the same input again resumes its run.

    With - as the input, JSON lines are tagged as they come, until the end of input or Ctrl-C.
    """
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.planning import find_inputs, make_plan, without_tagged
    from nermill.producer.runs.progress import counted, reading, say
    from nermill.producer.runs.queue import Queue

    is_stream = follow or (request.inputs == ("-",) and request.read.format in (None, "jsonl"))
    if new and is_stream:
        raise UsageError("--new knows files by their content, a stream has none yet; leave it out")
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
        return stream(request, queue, linger, high_water, follow=follow, ack=ack, wait=wait, as_json=json)
    with reading() as on_read:
        folder, plan = make_plan(request, on_read, found)
    say_left_out(plan.details.get("left_out", ()))
    return go_on(folder, plan, queue, high_water, wait=wait, as_json=json)
