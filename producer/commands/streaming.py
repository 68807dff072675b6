"""``submit -`` and ``submit --follow``: lines in as they come, acknowledged shard by shard."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING

from nermill.producer.commands.outcome import report_status, told_how_to_go_on
from nermill.worker.contracts.errors import StoreError, UsageError

if TYPE_CHECKING:
    from nermill.producer.runs.planning import Request
    from nermill.producer.runs.queue import Queue
    from nermill.producer.runs.stream import Stream
    from nermill.worker.contracts.plan import Shard


def stream(
    request: Request,
    queue: Queue,
    linger: float,
    high_water: int,
    *,
    follow: bool,
    ack: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Feeds an open run from standard input or a growing file until its end or Ctrl-C.

    Raises:
        UsageError: the input cannot be followed.
        StoreError: a shard could not be written, or its acknowledgement not be told; ``nermill resume`` closes the run.
    """
    from nermill.producer.runs import run as runs
    from nermill.producer.runs.progress import say, watching
    from nermill.producer.runs.status import look
    from nermill.producer.runs.stream import Stream

    descriptor, name = _open(request, follow)
    stream = Stream(
        request.out,
        queue,
        model=request.model,
        options=request.options,
        limits=request.limits,
        linger=linger,
        high_water=high_water,
        source=name,
        priority=request.priority,
        on_shard=_acknowledge if ack else lambda _: None,
    )
    with told_how_to_go_on(f"nermill resume {stream.run.uri}"):
        say(f"stream open: {stream.run.uri}")
        interrupted = _feed(stream, descriptor, name, request, follow)
        plan = stream.close()
        say(f"stream closed: {plan.documents:,} documents in {len(plan.shards):,} shards are durable")
        if interrupted and not follow:
            raise KeyboardInterrupt
        if wait:
            with watching() as show:
                runs.wait(stream.run, plan, queue, show)
    code = report_status(look(stream.run, plan, queue), as_json=as_json)
    return code if wait else 0


def _open(request: Request, follow: bool) -> tuple[int, str]:
    if not follow:
        return sys.stdin.fileno(), "-"
    if len(request.inputs) != 1:
        raise UsageError(f"--follow tails one file, not {len(request.inputs)}; start one stream for each")
    name = request.inputs[0]
    try:
        return os.open(name, os.O_RDONLY), name
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror}); check the path") from None


def _acknowledge(shard: Shard) -> None:
    from nermill.producer.entities.view import print_json

    try:
        print_json({name: value for name, value in asdict(shard).items() if name != "sha256"})
    except OSError as error:
        # What is still buffered would fail once more at the interpreter's end, whose exit code hides ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = f"standard output takes no more acknowledgements ({error.strerror})"
        raise StoreError(f"{reason}; send again what comes behind the last one") from None


def _feed(stream: Stream, descriptor: int, name: str, request: Request, follow: bool) -> bool:
    """Reads in a thread of its own, so that Ctrl-C never falls between a shard and its record; True after Ctrl-C."""
    stop, done = threading.Event(), threading.Event()
    failures: list[Exception] = []

    def read() -> None:
        from nermill.producer.runs.stream import live_lines
        from nermill.producer.sources.jsonl import parse_live_line

        try:
            for number, line in live_lines(descriptor, stop, follow=follow):
                if line is None or line.strip():
                    stream.add(parse_live_line(line, f"{name}:{number}", request.read))
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
        raise failures[0]
    return interrupted
