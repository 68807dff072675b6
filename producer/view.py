"""What a person reads on standard output: tables, marked texts, JSON; colour only where it is wanted."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from producer.progress import duration
from producer.show import Shown
from producer.status import Status

if TYPE_CHECKING:
    from rich.console import Console

    from producer.doctor import Finding
    from producer.estimate import Estimate

LABEL_STYLES = {"PER": "bold green", "ORG": "bold cyan", "LOC": "bold yellow", "MISC": "bold magenta"}
OTHER_LABEL_STYLE = "bold blue"
_UNLIMITED = 1 << 20
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def print_json(body: Any) -> None:
    """One object on one line of standard output."""
    print(json.dumps(body, ensure_ascii=False), flush=True)


def print_status(status: Status) -> None:
    """A run's status as a small table on standard output."""
    rows = [
        ("run", f"{status.run} ({status.state})"),
        ("shards", f"{status.committed:,} of {status.planned:,} committed"),
        ("documents", f"{status.ok:,} ok, {status.rejected:,} rejected, of {status.total:,}"),
    ]
    if status.state != "complete" and (status.progress.waiting or status.progress.leased):
        rows.append(("queue", f"{status.progress.waiting:,} shards wait, {status.progress.leased:,} at work"))
    if status.progress.trouble:
        rows.append(("trouble", status.progress.trouble))
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


def comparison_line(comparison: dict[str, Any]) -> str:
    """The difference of two runs in one line, the other one's gain first."""
    f1 = comparison.get("f1")
    low, high = f1["difference_interval"] if f1 else (0.0, 0.0)
    scored = f"F1 {f1['other']:.4f}, {f1['difference']:+.4f} (95 % {low:+.4f} to {high:+.4f}); " if f1 else ""
    tags = f"{comparison['documents_with_other_tags']:,} of {comparison['documents']:,} documents have other tags"
    return f"{scored}{tags}; throughput x {comparison['throughput']['ratio']:.2f}"


def print_result_hint(run: str) -> None:
    """Where the table is, and a line that reads it with what is installed already."""
    pattern = f"{run}/part-*.parquet"
    print_rows([("table", pattern)])
    if "://" not in run:
        pattern = min(pattern, os.path.relpath(pattern), key=len)
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
        ("documents", f"{found.documents:,} ({found.rejected:,} of them will be rejected), shards: {found.shards:,}"),
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
    print_rows([(finding.name, f"{'ok   ' if finding.ok else 'FAILS'} {finding.detail}")])
    if finding.mend:
        print_rows([("", f"      mend it: {finding.mend}")])


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Names and values as two columns, wrapped at words on a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    for name, value in rows:
        lead = f"{name:<10} "
        print(
            textwrap.fill(
                value,
                width,
                initial_indent=lead,
                subsequent_indent=" " * len(lead),
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


def visible(text: str) -> str:
    """Text from a document as it may go to a terminal: control characters could steer it."""
    return _CONTROLS.sub("\ufffd", text)


def print_marked(shown: Shown, console: Console) -> None:
    """A document with its entities marked: coloured on a terminal, in brackets elsewhere."""
    from rich.text import Text

    line = Text(visible(f"{shown.row['doc_id']}  "), style="dim")
    if shown.row["status"] != "ok":
        line.append("rejected", style="red")
    for raw, label in shown.pieces():
        piece = visible(raw)
        if label:
            style = LABEL_STYLES.get(label, OTHER_LABEL_STYLE)
            line.append(f"[{piece}", style=style).append(f" {label}]", style=f"{style} dim")
        else:
            line.append(piece, style="default not dim")
    console.print(line, soft_wrap=not console.is_terminal)
