"""Prints results on standard output: tables, texts with marked entities, JSON; colours only on a terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from nermill.producer.entities.show import TaggedDocument
from nermill.producer.runs.progress import LABEL_WIDTH, counted, duration, rows
from nermill.producer.runs.status import Status
from nermill.worker.contracts.console import visible

if TYPE_CHECKING:
    from rich.console import Console

    from nermill.producer.doctor import Finding
    from nermill.producer.runs.estimate import Estimate
    from nermill.producer.runs.listing import Listed

LABEL_STYLES = {"PER": "bold green", "ORG": "bold cyan", "LOC": "bold yellow", "MISC": "bold magenta"}
OTHER_LABEL_STYLE = "bold blue"
_UNLIMITED = 1 << 20
_LONGEST_BAR = 60
_WAYS = {
    "padded": "padded to the longest",
    "bucketed": "one a row of the nearest length",
    "packed": "packed",
    "equal": "rows of equal length",
}


def print_json(body: Any) -> None:
    """Prints a value as JSON on one line."""
    print(json.dumps(body, ensure_ascii=False), flush=True)


def print_status(status: Status) -> None:
    """Prints a run's status as a small table."""
    print_rows([("run", f"{nearest(status.run)} ({status.state})"), *rows(status)])
    if status.scores is not None:
        print_rows([("scores", score_line(status.scores))])


def score_line(scores: dict[str, Any]) -> str:
    """Scores in one line."""
    strict = f"; strict F1 {scores['strict']['f1']:.4f}" if scores.get("strict") else ""
    return f"F1 {scores['f1']:.4f} (precision {scores['precision']:.4f}, recall {scores['recall']:.4f}){strict}"


def comparison_line(comparison: dict[str, Any]) -> str:
    """The difference of two runs in one line: the other run's F1 and gain, tags, throughput."""
    f1 = comparison.get("f1")
    low, high = f1["difference_interval"] if f1 else (0.0, 0.0)
    scored = f"F1 {f1['other']:.4f}, {f1['difference']:+.4f} (95 % {low:+.4f} to {high:+.4f}); " if f1 else ""
    tags = f"{comparison['documents_with_other_tags']:,} of {comparison['documents']:,} documents have other tags"
    return f"{scored}{tags}; throughput x {comparison['throughput']['ratio']:.2f}"


def print_result_hint(run: str) -> None:
    """Prints where the table is, and a command that reads it with pyarrow, which is installed."""
    pattern = f"{nearest(run)}/part-*.parquet"
    print_rows([("table", pattern)])
    if "://" not in run:
        table = f"p.read_table(sorted(glob.glob('{pattern}')))"
        code = f"import glob, pyarrow.parquet as p; print({table}.slice(0, 3).to_pylist())"
        print(f'{"read it":<{LABEL_WIDTH}} python -c "{code}"')


def nearest(run: str) -> str:
    """A run's path relative to the working directory where that is shorter; a URI as it is."""
    return run if "://" in run else min(run, os.path.relpath(run), key=len)


def print_runs(runs: list[Listed]) -> None:
    """Prints runs as a table with a heading, one a line; prints nothing where there are none."""
    table = [("state", "documents", "created", "model", "F1", "run")] if runs else []
    for entry in runs:
        total, finished = entry.documents["total"], entry.documents["finished"]
        documents = f"{total:,}" if finished == total else f"{finished:,} of {total:,}"
        f1 = "" if entry.f1 is None else f"{entry.f1:.4f}"
        table.append((entry.state, documents, entry.created, entry.model, f1, nearest(entry.run)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print(visible("  ".join(cells)).rstrip())


def print_estimate(found: Estimate) -> None:
    """Prints the result of ``nermill plan`` with its histogram."""
    documents = found.documents - found.rejected
    known = " (planned before: submitting resumes it)" if found.exists else ""
    table = [("run", nearest(found.run) + known)] if found.run else []
    rejected = f"; {found.rejected:,} will be rejected" if found.rejected else ""
    table += [
        ("documents", f"{found.documents:,} in {counted(found.shards, 'shard')}{rejected}"),
        ("tokens", f"{found.tokens:,}; the longest document has {found.longest:,} (by {found.tokens_from})"),
    ]
    if found.max_length:
        share = found.long / documents if documents else 0.0
        long = f"{counted(found.long, 'document')} ({share:.1%}) above the model's {found.max_length} tokens"
        table.append(("long", f"{long}, tagged in windows" if found.long else long))
    if found.duplicates:
        duplicates = f"{counted(found.duplicates, 'document')} with an id that came before"
        table.append(("ids", f"{duplicates}: {', '.join(found.duplicate_ids)}"))
    if found.seconds:
        table.append(("time", f"{duration(found.seconds[found.way])} of one device ({found.seconds_from})"))
        told = ", ".join(f"{_WAYS[way]} {duration(seconds)}" for way, seconds in found.seconds.items())
        table.append(("ways", f"{told}; full batches, the same table"))
    elif found.max_length:
        table.append(("time", "unknown: nermill-build bench MODEL --json > MODEL/bench.json measures the device"))
    if found.price is not None:
        per_million = found.price["per_million_documents"]
        each = "" if per_million is None else f", {_money(per_million)} for a million documents like these"
        table.append(("price", f"{_money(found.price['run'])}{each} (at {found.price['per_hour']:g} an hour)"))
    print_rows(table)
    _print_histogram(found)


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.2g}"


def _print_histogram(found: Estimate) -> None:
    counts = [entry["documents"] for entry in found.histogram]
    filled = [at for at, documents in enumerate(counts) if documents]
    if not filled:
        return
    most, width = max(counts), min(_LONGEST_BAR, max(10, _columns(80) - 40))
    print(f"\n{'tokens':>14} {'':<{width}} documents")
    for entry in found.histogram[filled[0] : filled[-1] + 1]:
        label = f"{entry['from']:,} to {entry['to']:,}" if entry["to"] else f"{entry['from']:,} or more"
        bar = "█" * round(width * entry["documents"] / most) or ("▏" if entry["documents"] else "")
        print(f"{label:>14} {bar:<{width}} {entry['documents']:>9,} {entry['documents'] / sum(counts):>7.1%}")


def print_finding(finding: Finding) -> None:
    """Prints the result of one check of ``nermill doctor``."""
    mark, style = ("ok", "green") if finding.ok else ("FAILS", "bold red")
    _print_filled(f"{finding.name:<{LABEL_WIDTH}} ", finding.detail, f"{mark:<6}", style)
    if finding.fix:
        _print_filled(" " * (LABEL_WIDTH + 1), finding.fix, "fix: ", "bold")


def print_rows(table: list[tuple[str, str]]) -> None:
    """Prints names and values in two columns, wrapped at words on a terminal."""
    for name, value in table:
        _print_filled(f"{name:<{LABEL_WIDTH}} ", value)


def _print_filled(name: str, value: str, mark: str = "", style: str = "") -> None:
    from rich.console import Console
    from rich.text import Text

    lead = len(name) + len(mark)
    filled = textwrap.fill(
        visible(value),
        _columns(_UNLIMITED),
        initial_indent=name + mark,
        subsequent_indent=" " * lead,
        break_long_words=False,
        break_on_hyphens=False,
    )
    line = Text(filled)
    line.stylize("dim", 0, len(name))
    line.stylize(style, len(name), lead)
    Console(highlight=False).print(line, soft_wrap=True)


def _columns(otherwise: int) -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else otherwise


def print_marked(document: TaggedDocument, console: Console) -> None:
    """Prints a document's id and its text with the entities marked, in brackets and, on a terminal, in colours."""
    from rich.text import Text

    name = visible(document.row["doc_id"])
    line = Text(f"{name}  " if name else "", style="dim")
    if document.row["status"] != "ok":
        line.append("rejected", style="red")
    for raw, label in document.pieces():
        piece = visible(raw)
        if label:
            style = LABEL_STYLES.get(label, OTHER_LABEL_STYLE)
            line.append(f"[{piece}", style=style).append(f" {label}]", style=f"{style} dim")
        else:
            line.append(piece, style="default not dim")
    console.print(line, soft_wrap=not console.is_terminal)
    if console.is_terminal:
        console.print()  # an empty line between documents, since lines wrap
