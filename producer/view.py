"""What a person sees: progress on standard error, results on standard output, colour only where it is wanted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from producer.run import OnStatus
from producer.show import Shown
from producer.status import Status

if TYPE_CHECKING:
    from rich.console import Console

    from producer.doctor import Finding
    from producer.estimate import Estimate

LINE_SECONDS = 10.0
LABEL_STYLES = {"PER": "bold green", "ORG": "bold cyan", "LOC": "bold yellow", "MISC": "bold magenta"}
OTHER_LABEL_STYLE = "bold blue"


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(f"nermill: {text}", file=sys.stderr, flush=True)


def print_json(body: Any) -> None:
    """One object on one line of standard output."""
    print(json.dumps(body, ensure_ascii=False), flush=True)


@contextmanager
def watching() -> Iterator[OnStatus]:
    """Progress of a run: a bar on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines()


def _lines() -> OnStatus:
    last, said_complete = 0.0, False

    def on_status(status: Status) -> None:
        nonlocal last, said_complete
        is_news = status.state == "complete" and not said_complete
        if is_news or (not said_complete and time.monotonic() - last >= LINE_SECONDS):
            say(progress_line(status))
            last, said_complete = time.monotonic(), is_news

    return on_status


@contextmanager
def _bar() -> Iterator[OnStatus]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=None), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), expand=True, transient=True) as progress:
        task = progress.add_task("waiting for a worker", total=None)

        def on_status(status: Status) -> None:
            total = status.total or None
            text = progress_line(status)
            progress.update(task, total=total, completed=status.finished_documents, description=text)

        yield on_status


@contextmanager
def reading() -> Iterator[Callable[[int], None]]:
    """Progress of reading inputs, on a terminal alone."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading", spinner="dots") as status:
        yield lambda documents: status.update(f"reading: {documents:,} documents")


def progress_line(status: Status) -> str:
    """How far a run is, in one line that fits 80 columns."""
    parts = [f"{status.finished_documents:,}/{status.total:,} documents"]
    if not status.committed and not status.progress.leased:
        return f"{parts[0]}, waiting for a worker"
    parts.append(f"{status.documents_per_second:,.0f}/s")
    if status.rejected:
        parts.append(f"{status.rejected:,} rejected")
    if status.eta_seconds is not None and status.state == "running":
        parts.append(f"{duration(status.eta_seconds)} left")
    return ", ".join(parts)


def print_status(status: Status) -> None:
    """A run's status as a small table on standard output."""
    rows = [
        ("run", f"{status.run} ({status.state})"),
        ("shards", f"{status.committed:,} of {status.planned:,} committed"),
        ("documents", f"{status.ok:,} ok, {status.rejected:,} rejected, of {status.total:,}"),
    ]
    if status.state != "complete" and (status.progress.waiting or status.progress.leased):
        rows.append(("queue", f"{status.progress.waiting:,} shards wait, {status.progress.leased:,} at work"))
    if status.committed:
        speed = f"{status.documents_per_second:,.0f} documents/s, {status.tokens_per_second:,.0f} tokens/s"
        rows.append(("speed", f"{speed}, padding {status.padding_share:.1%}, {duration(status.seconds)}"))
    if status.state == "running" and status.eta_seconds is not None:
        rows.append(("left", duration(status.eta_seconds)))
    rows += [
        ("worker", f"{name} on {entry['device']}: {entry['documents']:,} documents")
        for name, entry in status.workers.items()
    ]
    if status.scores is not None:
        rows.append(("scores", score_line(status.scores)))
    print_rows(rows)


def score_line(scores: dict[str, Any]) -> str:
    """Scores in one line."""
    strict = f"; strict F1 {scores['strict']['f1']:.4f}" if scores.get("strict") else ""
    return f"F1 {scores['f1']:.4f} (precision {scores['precision']:.4f}, recall {scores['recall']:.4f}){strict}"


def print_result_hint(run: str) -> None:
    """Where the table is, and a line that reads it with what is installed already."""
    pattern = f"{run}/part-*.parquet"
    print(f"{'table':<10} {pattern}")
    if "://" not in run:
        table = f"p.read_table(sorted(glob.glob('{pattern}')))"
        code = f"import glob, pyarrow.parquet as p; print({table}.slice(0, 3).to_pylist())"
        print(f'{"read it":<10} python -c "{code}"')


def print_estimate(found: Estimate) -> None:
    """A dry run's result with its histogram, on standard output."""
    documents = found.documents - found.rejected
    rows = (
        [("run", found.run + (" (planned before: submitting resumes it)" if found.exists else ""))] if found.run else []
    )
    rows += [
        ("documents", f"{found.documents:,} in {found.shards:,} shards, {found.rejected:,} of them will be rejected"),
        ("tokens", f"{found.tokens:,}, longest {found.longest:,} (by {found.tokens_from})"),
    ]
    if found.max_length:
        share = found.long / documents if documents else 0.0
        rows.append(
            ("long", f"{found.long:,} documents ({share:.1%}) above the model's {found.max_length} tokens: in windows")
        )
    if found.duplicates:
        rows.append(("ids", f"{found.duplicates:,} documents repeat an id: {', '.join(found.duplicate_ids)}"))
    if found.seconds is not None:
        rows.append(("time", f"{duration(found.seconds)} of one device ({found.seconds_from})"))
    print_rows(rows)
    most = max(found.counts)
    for entry in found.histogram:
        label = f"{entry['from']:,}-{entry['to']:,}" if entry["to"] else f"{entry['from']:,}+"
        if entry["documents"]:
            print(f"{label:>12} {'█' * round(40 * entry['documents'] / most):<40} {entry['documents']:,}")


def print_finding(finding: Finding) -> None:
    """One thing that doctor looked at, and what to do about it."""
    print(f"{'ok' if finding.ok else 'FAILS':<6} {finding.name:<9} {finding.detail}")
    if finding.mend:
        print(f"{'':<16} mend it: {finding.mend}")


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Names and values as two columns."""
    for name, value in rows:
        print(f"{name:<10} {value}")


def print_marked(shown: Shown, console: Console) -> None:
    """A document with its entities marked: coloured on a terminal, in brackets elsewhere."""
    from rich.text import Text

    line = Text(f"{shown.row['doc_id']}  ", style="dim")
    if shown.row["status"] != "ok":
        line.append("rejected", style="red")
    for piece, label in shown.pieces():
        if label:
            style = LABEL_STYLES.get(label, OTHER_LABEL_STYLE)
            line.append(f"[{piece}", style=style).append(f" {label}]", style=f"{style} dim")
        else:
            line.append(piece, style="default not dim")
    console.print(line, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
