"""How far things are, on standard error: a live picture on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nermill.producer.runs.run import OnStatus
from nermill.producer.runs.status import Status
from nermill.producer.sources.reading import OnRead
from nermill.worker.contracts.console import visible
from nermill.worker.contracts.records import WorkerProcess

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_SECONDS = 10.0
LABEL_WIDTH = 10
_BAR_WIDTH = 50
_SHOWN_WORKERS = 8

OnCount = Callable[[int, int], None]


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(f"nermill: {visible(text)}", file=sys.stderr, flush=True)


@contextmanager
def watching(*, own_worker: bool = False) -> Iterator[OnStatus]:
    """Progress of a run; with ``own_worker`` nobody is told to start one."""
    if sys.stderr.isatty():
        with _picture(own_worker) as show:
            yield show
    else:
        yield _lines()


def paused(show: OnStatus) -> OnStatus:
    """Progress while sending waits for the workers; says so once."""
    said = False

    def on_wait(status: Status) -> None:
        nonlocal said
        if not said:
            say(f"{status.progress.unfinished_documents:,} documents are unfinished: sending waits for the workers")
            said = True
        show(status)

    return on_wait


@contextmanager
def reading() -> Iterator[OnRead]:
    """A bar for the reading of inputs, on a terminal alone."""
    with _bar("reading", "documents") as update:
        yield lambda far: update(far.bytes, far.total_bytes, far.documents)


@contextmanager
def counting(name: str, noun: str) -> Iterator[OnCount]:
    """A bar for work whose size is known, on a terminal alone; to be told how much is done, and of how much."""
    with _bar(name, noun) as update:
        yield lambda done, total: update(done, total, done)


@contextmanager
def _bar(name: str, noun: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar; to be told how far it is, its end, and the number that is shown."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(_BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn(f"{{task.fields[shown]:,}} {noun}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None, shown=0)
        yield lambda done, total, shown: bar.update(task, completed=done, total=total, shown=shown)


def facts(status: Status) -> list[str]:
    """How far a run is, in a line, the most important first."""
    found = [f"{status.finished_documents:,}/{status.total:,} documents"]
    if status.trouble:
        return [*found, status.trouble]
    if not status.committed:
        return [*found, _at_work(status) or "waiting for a worker"]
    found.append(f"{status.documents_per_second:,.0f} documents/s")
    if status.rejected:
        found.append(f"{status.rejected:,} rejected")
    if status.state == "running" and status.eta_seconds is not None:
        found.append(f"{duration(status.eta_seconds)} left")
    return found


def rows(status: Status, *, own_worker: bool = False) -> list[tuple[str, str]]:
    """How far a run is, as names and values; with ``own_worker`` it is no trouble that none listens yet."""
    progress = status.progress
    is_open = ", the stream is open" if progress.state == "open" else ""
    found = [
        ("shards", f"{status.committed:,} of {status.planned:,} committed{is_open}"),
        ("documents", f"{status.ok:,} ok, {status.rejected:,} rejected, of {status.total:,}"),
    ]
    if status.state != "complete" and (progress.waiting or progress.leased):
        waiting = "shard waits" if progress.waiting == 1 else "shards wait"
        computed = f" ({_tokens(status)} computed)" if progress.leased_tokens else ""
        found.append(("queue", f"{progress.waiting:,} {waiting}, {progress.leased:,} at work{computed}"))
    if trouble := status.trouble or ("" if own_worker else _nobody_listens(status)):
        found.append(("trouble", trouble))
    if status.committed:
        speed = f"{status.documents_per_second:,.0f} documents/s, {status.tokens_per_second:,.0f} tokens/s"
        found.append(("speed", f"{speed}, padding {status.padding_share:.1%}, {duration(status.seconds)}"))
    if status.state == "running" and status.eta_seconds is not None:
        found.append(("left", duration(status.eta_seconds)))
    workers = {name: (entry["device"], entry["documents"]) for name, entry in status.workers.items()}
    if status.state == "running":
        idle = {worker.name: (worker.device, 0) for worker in _able(status)}
        workers = dict(sorted((idle | workers).items()))
    found += [
        ("worker", f"{name} on {device}: {counted(documents, 'document')}")
        for name, (device, documents) in list(workers.items())[:_SHOWN_WORKERS]
    ]
    if len(workers) > _SHOWN_WORKERS:
        found.append(("", f"and {len(workers) - _SHOWN_WORKERS:,} more, which --json lists"))
    return found


def _at_work(status: Status) -> str:
    """How far the shards are that workers hold; empty where there is none."""
    if not status.progress.leased:
        return ""
    return f"the first are at work: {_tokens(status)}" if status.progress.leased_tokens else "the first are at work"


def _tokens(status: Status) -> str:
    return f"{status.progress.leased_computed:,} of {status.progress.leased_tokens:,} tokens"


def _able(status: Status) -> list[WorkerProcess]:
    """The workers that may take shards of the run."""
    return [worker for worker in status.listening if status.progress.artifact in ("", worker.artifact)]


def _nobody_listens(status: Status) -> str:
    """That no worker is there at all, which is no trouble yet while one starts."""
    progress = status.progress
    if status.state != "running" or not progress.waiting or progress.leased or status.listening:
        return ""
    return "no worker listens at the broker; start one: nermill-worker"


def counted(number: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _lines() -> OnStatus:
    last, said_complete = 0.0, False

    def on_status(status: Status) -> None:
        nonlocal last, said_complete
        is_news = status.state == "complete" and not said_complete
        if is_news or (not said_complete and time.monotonic() - last >= LINE_SECONDS):
            say(", ".join(facts(status)))
            last, said_complete = time.monotonic(), is_news

    return on_status


@contextmanager
def _picture(own_worker: bool) -> Iterator[OnStatus]:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=5) as live:
        yield lambda status: live.update(_painted(status, own_worker))


def _painted(status: Status, own_worker: bool) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    # Lines end before the terminal does: else the ^C of Ctrl-C would begin a new one and leave a piece behind.
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(max(1, status.total), status.finished_documents, width=_BAR_WIDTH),
        f"{status.finished_documents / max(1, status.total):.0%}",
    )
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", width=LABEL_WIDTH)
    table.add_row(status.state, bar)
    for name, value in rows(status, own_worker=own_worker):
        table.add_row(name, Text(visible(value), style="yellow" if name == "trouble" else ""))
    return table
