"""Evaluates a run's folder: throughput, and scores where there are gold tags."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice, bare_labels, choice_of
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.evaluation.blocks import OnDocuments, Parts
from nermill.worker.evaluation.calibration import Calibration
from nermill.worker.evaluation.chunks import LabelIndex, find_chunks
from nermill.worker.evaluation.comparison import Comparison
from nermill.worker.evaluation.gold import GoldFile
from nermill.worker.evaluation.headline import Headline
from nermill.worker.evaluation.lengths import Lengths
from nermill.worker.evaluation.mistakes import Mistakes
from nermill.worker.evaluation.provenance import describe_origin, find_manifest
from nermill.worker.evaluation.scores import REPLICATES, ChunkCounts
from nermill.worker.evaluation.selection import describe_choice, explain_labels
from nermill.worker.evaluation.throughput import measure_throughput

REPORT_VERSION = 1


@dataclass(frozen=True)
class GoldOptions:
    """A gold file.

    Attributes:
        path: A CoNLL file.
        word_column, tag_column: Its columns, from 1, or negative from the end; None searches for them.
    """

    path: Path
    word_column: int | None = None
    tag_column: int | None = None


def evaluate(
    run: RunFolder,
    *,
    gold: Path | GoldOptions | None = None,
    partial: bool = False,
    compare: RunFolder | None = None,
    choice: LabelChoice | None = None,
    seqeval: bool = False,
    on_documents: OnDocuments = lambda *_: None,
) -> dict[str, Any]:
    """Computes scores and throughput of a run, in constant memory.

    The main scores are computed by seqeval, up to ``headline.SENTENCES`` documents, and compared with nermill's counts.

    Args:
        run: The run's folder.
        gold: CoNLL file with gold tags for the run's documents; None takes the gold tags of the input.
        choice: Which labels are renamed or left out, in addition to the run's own options.
        partial: Evaluate a run although parts are missing.
        compare: Another run over the same documents; the difference is reported under ``compare``.
        seqeval: Let seqeval score all documents, however many: about 45 s and 16 MB for a million words.
        on_documents: Called now and then with the documents read so far, and all of the run.

    Returns:
        The content of ``_report.json``; without gold tags it has no scores.

    Raises:
        UsageError: there is no run, it is not complete, a part is damaged, or gold tags do not match.
        EvaluationError: seqeval's scores and nermill's differ.
    """
    choice = choice or LabelChoice()
    gold = GoldOptions(gold) if isinstance(gold, Path) else gold
    parts, plan, warnings = _open_run(run, LabelIndex(choice), gold, partial)
    parts.on_documents = on_documents
    counts, mistakes = ChunkCounts(parts.labels), Mistakes(parts.labels)
    headline = Headline(parts.labels, unlimited=seqeval)
    calibration, lengths = Calibration(parts.labels), Lengths()
    for block in parts.blocks():
        lengths.add(block.rows)
        if len(block.scored):
            true, predicted = find_chunks(block.gold), find_chunks(block.predicted)
            counts.add(block, true, predicted)
            headline.add(block)
            mistakes.add(block, true, predicted)
            calibration.add(block, true)
    manifest = find_manifest(plan, parts.seen)
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "run": run.uri,
        "run_id": plan.run_id,
        "unit": plan.unit,
        "documents": sum(part.rows for part in parts.seen),
    }
    if counts.documents:
        scores = headline.apply(counts.scores())
        warnings += _unknown_labels(run, plan, counts, manifest, gold, scores["f1"])
        report |= _describe_gold(parts) | scores
        report |= mistakes.summary() | {"calibration": calibration.summary()}
    else:
        warnings.append("no gold tags in the run, so there are no scores; name them with --gold FILE")
    run_choice = choice_of(plan.options)
    if not (run_choice.is_all and choice.is_all):
        report["labels"], left_out = describe_choice((run_choice, choice), _label_changes(parts))
        warnings += left_out
    if compare is not None:
        report["compare"] = _compare(run, compare, gold, partial, choice, on_documents)
    return report | {
        "throughput": measure_throughput([entry for part in parts.seen for entry in part.stats]),
        "lengths": lengths.summary() | {"shapes": [list(shape) for shape in manifest.shapes] if manifest else []},
        "origin": describe_origin(plan, parts.seen, manifest),
        "warnings": warnings,
    }


def _open_run(
    run: RunFolder, labels: LabelIndex, gold: GoldOptions | None, partial: bool
) -> tuple[Parts, Plan, list[str]]:
    plan = read_plan(run)
    shards, warnings = _shards_to_read(run, plan, partial)
    file = None
    if gold is not None:
        file = GoldFile(gold.path, plan.unit, gold.word_column, gold.tag_column, choice_of(plan.options))
    return Parts(run, shards, labels, plan.documents, file), plan, warnings


def _label_changes(parts: Parts) -> Counter[str]:
    """Label changes of the run and of this evaluation; with a gold file, the run's changes of gold do not count."""
    changes = Counter(parts.labels.changes)
    for entry in (entry for part in parts.seen for entry in part.stats):
        counted = entry.get("labels", {})
        changes.update({k: n for k, n in counted.items() if parts.gold is None or not k.startswith("gold.")})
    if parts.gold is not None:
        changes.update(parts.gold.changes)
    return changes


def _shards_to_read(run: RunFolder, plan: Plan, partial: bool) -> tuple[list[int], list[str]]:
    planned = {shard.index: shard.documents for shard in plan.shards}
    committed = run.committed()
    missing = (planned.keys() | (run.shards() if plan.is_open else set())) - committed
    if not committed:
        raise UsageError(f"{run.uri}: it has no part yet; wait for the run, or nermill resume it")
    if not missing and not plan.is_open:
        return sorted(committed), []
    what = "it is a stream that still grows"
    if missing:
        documents = sum(planned.get(shard, 0) for shard in missing)
        what = (
            f"{len(missing):,} of {len(committed | missing):,} shards"
            f" ({documents:,} of {plan.documents:,} documents) have no part"
        )
    if not partial:
        raise UsageError(
            f"{run.uri}: not complete: {what}; nermill resume it, or evaluate what is there with --partial"
        )
    return sorted(committed), [f"partial: {what}"]


def _describe_gold(parts: Parts) -> dict[str, Any]:
    return {
        "scheme": "IOB2",
        "mode": "conlleval",
        "average": "micro",
        "gold": str(parts.gold.path) if parts.gold else "in the run",
        "gold_scheme": parts.gold.scheme if parts.gold else "IOB2",
        "intervals": {"level": 0.95, "method": "bootstrap over documents, percentile", "resamples": REPLICATES},
    }


def _unknown_labels(
    run: RunFolder, plan: Plan, counts: ChunkCounts, manifest: Manifest | None, gold: GoldOptions | None, f1: float
) -> list[str]:
    """Warning about gold labels that the model does not have.

    Raises:
        UsageError: instead of the warning, where the user named a gold file.
    """
    rows = dict(zip(counts.labels.names, counts.conlleval.tolist(), strict=True))
    if manifest is not None:
        named = (choice_of(plan.options).target(label) for label in bare_labels(manifest.labels))
        known = sorted({counts.labels.choice.target(name) for name in named if name} - {""})
    elif not f1:  # without a manifest, the labels that the model predicted
        known = sorted(name for name, row in rows.items() if row[1])
    else:
        return []
    line = explain_labels(run.uri, {name: row[0] for name, row in rows.items()}, known, f1)
    if line and gold is not None:
        raise UsageError(f"{gold.path}: {line} --gold {gold.path}")
    return [line] if line else []


def _compare(
    run: RunFolder,
    other: RunFolder,
    gold: GoldOptions | None,
    partial: bool,
    choice: LabelChoice,
    on_documents: OnDocuments,
) -> dict[str, Any]:
    labels = LabelIndex(choice)
    mine, _, _ = _open_run(run, labels, gold, partial)
    mine.on_documents = on_documents
    theirs, plan, warnings = _open_run(other, labels, None, partial)
    found = Comparison(mine, theirs).run()
    origin = describe_origin(plan, theirs.seen, find_manifest(plan, theirs.seen))
    return {"run": other.uri, "run_id": plan.run_id, **found, "origin": origin, "warnings": warnings}
