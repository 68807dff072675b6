"""How far things are, on standard error: a live picture on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from producer.run import OnStatus
from producer.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_SECONDS = 10.0
_SHOWN_WORKERS = 8


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(f"nermill: {text}", file=sys.stderr, flush=True)


@contextmanager
def watching() -> Iterator[OnStatus]:
    """Progress of a run."""
    if sys.stderr.isatty():
        with _picture() as show:
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
def reading() -> Iterator[Callable[[int], None]]:
    """Progress of reading inputs, on a terminal alone."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading", spinner="dots") as status:
        yield lambda documents: status.update(f"reading: {documents:,} documents")


def facts(status: Status) -> list[str]:
    """How far a run is, the most important first."""
    found = [f"{status.finished_documents:,}/{status.total:,} documents"]
    if status.progress.trouble:
        return [*found, status.progress.trouble]
    if not status.committed:
        return [*found, "the first are at work" if status.progress.leased else "waiting for a worker"]
    found.append(f"{status.documents_per_second:,.0f} documents/s")
    if status.rejected:
        found.append(f"{status.rejected:,} rejected")
    if status.state == "running" and status.eta_seconds is not None:
        found.append(f"{duration(status.eta_seconds)} left")
    return found


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
def _picture() -> Iterator[OnStatus]:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=5) as live:
        yield lambda status: live.update(_painted(status))


def _painted(status: Status) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    first = Table.grid(expand=True, padding=(0, 1))
    first.add_column(ratio=1)
    first.add_column(no_wrap=True)
    first.add_row(ProgressBar(max(1, status.total), status.finished_documents), Text(", ".join(facts(status))))
    more = [f"{status.progress.waiting:,} shards wait, {status.progress.leased:,} at work"]
    if status.committed:
        more.append(f"{status.tokens_per_second:,.0f} tokens/s, padding {status.padding_share:.1%}")
    lines = [Text(", ".join(more), style="dim")]
    lines += [
        Text(
            f"{entry['device']}: {entry['documents']:,} documents ({name})",
            style="dim",
            overflow="ellipsis",
            no_wrap=True,
        )
        for name, entry in list(status.workers.items())[:_SHOWN_WORKERS]
    ]
    return Group(first, *lines)
