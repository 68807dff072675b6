"""Commands that read a run or the environment: evaluate, compact, doctor, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nermill.producer.commands import options as o
from nermill.producer.commands.request import column, label_list, mapping
from nermill.producer.runs.queue import DEFAULT_BROKER
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import REPORT_HTML


def evaluate(
    runs: o.Runs,
    gold: Annotated[
        Path | None, typer.Option("--gold", metavar="FILE", help="CoNLL file with gold tags; default: the run's own.")
    ] = None,
    min_f1: Annotated[
        float | None, typer.Option("--min-f1", metavar="F1", min=0, max=1, help="Exit with 4 below this F1.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option("--min-accuracy", metavar="SHARE", min=0, max=1, help="Exit with 4 below this word accuracy."),
    ] = None,
    min_documents_per_second: Annotated[
        float | None,
        typer.Option("--min-documents-per-second", metavar="N", min=0, help="Exit with 4 below this throughput."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="RUN", help="Another run over the same documents; its difference is reported."
        ),
    ] = None,
    word_column: o.WordColumn = None,
    tag_column: o.TagColumn = None,
    label_map: o.LabelMap = "",
    only: o.OnlyLabels = "",
    min_score: o.MinScore = 0.0,
    partial: Annotated[bool, typer.Option("--partial", help="Evaluate the parts of an unfinished run.")] = False,
    seqeval: Annotated[
        bool,
        typer.Option("--seqeval", help="Let seqeval score all documents, even more than 20,000."),
    ] = False,
    json: o.Json = False,
) -> int:
    """Score a run against gold tags and measure its throughput; writes _report.json and _report.html.

    The columns are those of the gold file. Labels are mapped and left out in gold and prediction, after the run's own
    options.
    """
    from nermill.producer.entities.view import comparison_line, print_json, score_line
    from nermill.producer.runs.progress import counting, say
    from nermill.producer.runs.run import open_run, open_runs
    from nermill.worker.contracts.labels import LabelChoice
    from nermill.worker.evaluation import GoldOptions, write_report
    from nermill.worker.evaluation import evaluate as evaluated
    from nermill.worker.evaluation.thresholds import below_thresholds

    folders = [folder for folder, _ in open_runs(runs)]
    other = open_run(compare)[0] if compare else None
    choice = LabelChoice(mapping(label_map), label_list(only), min_score)
    columns = column("--word-column", word_column), column("--tag-column", tag_column)
    file = None if gold is None else GoldOptions(gold, *columns)
    code = 0
    for folder in folders:
        with counting("evaluating", "documents") as on_documents:
            report = evaluated(
                folder,
                gold=file,
                partial=partial,
                compare=other,
                choice=choice,
                seqeval=seqeval,
                on_documents=on_documents,
            )
        missed = below_thresholds(
            report, f1=min_f1, accuracy=min_accuracy, documents_per_second=min_documents_per_second
        )
        write_report(folder, report)
        if json:
            print_json(report)
        else:
            if "f1" in report:
                print(score_line(report))
            if other is not None:
                print(f"beside {other.uri}: {comparison_line(report['compare'])}")
            speed = f"{report['throughput']['documents_per_second']:,.1f} documents/s"
            print(f"{speed}; report: {folder.uri}/{REPORT_HTML}")
        for line in [*report["warnings"], *missed]:
            say(line)
        code = 4 if missed else code
    return code


def compact(
    runs: o.Runs,
    part_mib: Annotated[
        int,
        typer.Option(
            "--part-mib",
            metavar="MIB",
            min=1,
            help="Target size of a part in MiB; at most 16 Mi characters.",
        ),
    ] = 128,
    json: o.Json = False,
) -> int:
    """Join small parts into large ones; no reader sees a document twice.

    On a disk the new files replace the old ones in one step. A store has no such step, so _SUCCESS is removed
    meanwhile: list the folder, then check for _SUCCESS, then read.
    """
    from nermill.producer.entities.view import print_json
    from nermill.producer.runs.compact import compact as compacted
    from nermill.producer.runs.progress import counted, counting
    from nermill.producer.runs.run import open_runs

    for folder, plan in open_runs(runs):
        with counting("compacting", "shards read") as on_shard:
            before, after = len(plan.shards), len(compacted(folder, plan, part_mib << 20, on_shard).shards)
        if json:
            print_json({"run": folder.uri, "run_id": plan.run_id, "parts": {"before": before, "after": after}})
        elif before == after:
            print(f"{folder.uri}: {counted(before, 'part')}, none of them small enough to be joined to another")
        else:
            print(f"{folder.uri}: {counted(before, 'part')} became {after:,}")
    return 0


def doctor(
    broker: o.Broker = DEFAULT_BROKER,
    model: o.Model = "demo",
    devices: o.Devices = "auto",
    out: Annotated[
        str | None, typer.Option("--out", metavar="OUT", envvar="NERMILL_OUT", help="Folder or URI to be written.")
    ] = None,
    json: o.Json = False,
) -> int:
    """Check broker, workers, model, devices and write access, and say how to correct what fails."""
    from dataclasses import asdict

    from nermill.producer.doctor import examine
    from nermill.producer.entities.view import print_finding, print_json

    findings = []
    for finding in examine(broker, model, devices, out):
        findings.append(finding)
        if not json:
            print_finding(finding)
    if json:
        print_json({"ok": all(f.ok for f in findings), "findings": [asdict(f) for f in findings]})
    return 0 if all(finding.ok for finding in findings) else 1


def show(
    runs: o.Runs,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Documents shown of each run; default: 20, CoNLL all."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="text (entities marked) or conll (word and tag).")
    ] = "text",
    json: o.Json = False,
) -> int:
    """Show entities marked in their text, or write the tags as CoNLL columns."""
    from rich.console import Console

    from nermill.producer.entities.show import conll_lines, read_rows
    from nermill.producer.entities.view import print_json, print_marked
    from nermill.producer.runs.run import open_runs

    if format_ not in ("text", "conll"):
        raise UsageError(f"--format {format_!r}: one of text, conll")
    console = Console(highlight=False, emoji=False, markup=False)
    for folder, plan in open_runs(runs):
        if format_ == "conll":
            for line in conll_lines(folder, plan, limit):
                print(line)
            continue
        if len(runs) > 1 and not json:
            console.print(f"{folder.uri}:", style="bold", soft_wrap=True)
        for document in read_rows(folder, plan, limit or 20):
            if json:
                print_json({"run": folder.uri, **document.row, "text": document.text})
            else:
                print_marked(document, console)
    return 0
