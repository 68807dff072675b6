"""``submit -`` and ``submit --follow``: lines in as they come, acknowledged shard by shard."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from nermill.producer.commands.outcome import exit_code_of_sent, report_status, told_how_to_go_on
from nermill.worker.contracts.content import COMPRESSED
from nermill.worker.contracts.errors import NermillError, StoreError, UsageError

if TYPE_CHECKING:
    from nermill.producer.runs.base_stream import BaseStream
    from nermill.producer.runs.planning import Request
    from nermill.producer.runs.queue import Queue
    from nermill.producer.sources.live import LiveLines, Position
    from nermill.worker.contracts.plan import Shard


def stream(
    request: Request,
    queue: Queue,
    linger: float,
    high_water: int,
    *,
    follow: bool,
    resume: str,
    ack: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Feeds an open run from standard input or a growing file until its end or Ctrl-C.

    Args:
        resume: Folder of a run that goes on; empty for that of the followed file, or a new one.

    Raises:
        UsageError: the input cannot be followed, or is not the one that the run was begun with.
        StoreError: a shard could not be written, or its acknowledgement not be told; ``nermill resume`` closes the run.
    """
    from nermill.producer.runs import run as runs
    from nermill.producer.runs.continuation import find_durable, find_followed, followed_run_id
    from nermill.producer.runs.progress import counting, say, watching
    from nermill.producer.runs.status import look
    from nermill.producer.runs.stream import Stream
    from nermill.producer.runs.stream_by_value import StreamByValue

    lines, name = _open(request, follow)
    durable = find_durable(resume, request, queue) if resume else find_followed(request, queue) if follow else None
    position = durable.position if durable else None
    if durable and position:
        with counting("passing over", "bytes") as on_bytes:
            lines.skip(position, durable.run.uri, on_bytes)

    def acknowledge(shard: Shard, position: Position | None) -> None:
        if ack:
            _acknowledge(opened.plan.run_id, shard, position)

    make = partial(StreamByValue, on_error=request.read.on_error) if request.by_value else Stream
    opened = make(
        request.out,
        queue,
        model=request.model,
        options=request.options,
        limits=request.limits,
        linger=linger,
        high_water=high_water,
        source=name,
        priority=request.priority,
        on_shard=acknowledge,
        run_id=followed_run_id(request) if follow and not resume else "",
        durable=durable,
    )
    by_value = " --by-value" if request.by_value else ""
    again = (
        "the same command again" if follow else f"nermill submit -{by_value} --resume {opened.run.uri} < THE SAME INPUT"
    )
    with told_how_to_go_on(f"{again}; to end it: nermill resume {opened.run.uri}"):
        if durable and position:
            say(f"stream goes on behind line {position.line:,}, byte {position.byte:,}: {opened.run.uri}")
            acknowledge(durable.shards[-1], position)
        else:
            say(f"stream open: {opened.run.uri}")
        interrupted, rejected = _feed(opened, lines, name, request, follow)
        if request.by_value and not queue.workers():
            say("no worker is at the broker: what was sent becomes durable once one is there")
        plan = opened.close()
        say(f"stream closed: {plan.documents:,} documents in {len(plan.shards):,} shards are durable")
        if interrupted and not follow:
            raise KeyboardInterrupt
        if wait:
            with watching() as show:
                runs.wait(opened.run, plan, queue, show, opened.send_again)
    code = report_status(look(opened.run, plan, queue), as_json=as_json)
    return code if wait else exit_code_of_sent(rejected + opened.rejected, opened.run)


def _open(request: Request, follow: bool) -> tuple[LiveLines, str]:
    from nermill.producer.sources.live import LiveLines

    if not follow:
        return LiveLines(sys.stdin.fileno(), "-", follow=False), "-"
    if len(request.inputs) != 1:
        raise UsageError(f"--follow tails one file, not {len(request.inputs)}; start one stream for each")
    name = request.inputs[0]
    if name.endswith(COMPRESSED) or request.read.format not in (None, "jsonl"):
        raise UsageError(f"{name}: --follow reads JSON lines that are not compressed; submit it without --follow")
    try:
        descriptor = os.open(name, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror}); check the path") from None
    return LiveLines(descriptor, name, follow=True), name


def _acknowledge(run_id: str, shard: Shard, position: Position | None) -> None:
    from nermill.producer.entities.view import print_json

    body = {"run_id": run_id, "index": shard.index, "first": shard.first, "documents": shard.documents}
    if position is not None:
        body |= {"byte": position.byte, "line": position.line}
    try:
        print_json(body)
    except OSError as error:
        # What is still buffered would fail once more at the interpreter's end, whose exit code hides ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StoreError(f"standard output takes no more acknowledgements ({error.strerror})") from None


def _feed(stream: BaseStream, lines: LiveLines, name: str, request: Request, follow: bool) -> tuple[bool, int]:
    """Reads in a thread of its own, so that Ctrl-C never falls between a shard and its record.

    Returns:
        Whether Ctrl-C ended it, and how many lines were rejected.
    """
    stop, done = threading.Event(), threading.Event()
    failures: list[Exception] = []
    rejected = 0

    def read() -> None:
        from nermill.producer.sources.jsonl import parse_live_line

        nonlocal rejected
        try:
            for position, line in lines.read(stop):
                if line is None or line.strip():
                    document = parse_live_line(line, f"{name}:{position.line}", request.read)
                    rejected += document.fault is not None
                    stream.add(document, position)
        except Exception as error:  # raised below, where somebody hears it
            failures.append(error)
        finally:
            done.set()

    interrupted = False
    try:
        threading.Thread(target=read, name="reader").start()
        while not done.wait(0.2) and stream.failure is None:
            pass  # not join, which Ctrl-C makes believe that the thread is dead
    except KeyboardInterrupt:
        interrupted = True
    stop.set()
    stream.end()
    done.wait()
    if failures:
        if follow:
            with suppress(NermillError):
                stream.flush()  # what a rotated file held may not be there again
        raise failures[0]
    return interrupted, rejected
