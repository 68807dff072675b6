"""A run's folder to its report: scores where there is gold, throughput always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.contracts.plan import Plan, read_plan
from nermill.worker.evaluation.blocks import Parts
from nermill.worker.evaluation.calibration import Calibration
from nermill.worker.evaluation.chunks import Labels, find_chunks
from nermill.worker.evaluation.comparison import Comparison
from nermill.worker.evaluation.gold import GoldFile
from nermill.worker.evaluation.headline import Headline
from nermill.worker.evaluation.lengths import Lengths
from nermill.worker.evaluation.mistakes import Mistakes
from nermill.worker.evaluation.provenance import describe_origin, find_manifest
from nermill.worker.evaluation.scores import REPLICATES, Tally
from nermill.worker.evaluation.throughput import measure_throughput

REPORT_VERSION = 1


def evaluate(
    run: RunFolder,
    *,
    gold: Path | None = None,
    partial: bool = False,
    compare: RunFolder | None = None,
    seqeval: bool = False,
) -> dict[str, Any]:
    """Scores and throughput of a run, in constant memory.

    The headline scores are seqeval's own, up to ``headline.SENTENCES`` documents; our counts must equal them.

    Args:
        run: The run's folder.
        gold: CoNLL file with gold tags for the run's documents; else those that came with them.
        partial: Go on although parts are missing.
        compare: Another run over the same documents; its difference is reported under ``compare``.
        seqeval: Have seqeval score all documents, however many there are: about 45 s and 16 MB a million words.

    Returns:
        The content of ``_report.json``; without gold it has no scores.

    Raises:
        UsageError: no run, a run that is not complete, a damaged part, gold that does not fit.
        EvaluationError: seqeval's scores and ours differ.
    """
    parts, plan, warnings = _open_run(run, Labels(), gold, partial)
    tally, mistakes = Tally(parts.labels), Mistakes(parts.labels)
    headline = Headline(parts.labels, unlimited=seqeval)
    calibration, lengths = Calibration(parts.labels), Lengths()
    for block in parts.blocks():
        lengths.add(block.rows)
        if len(block.scored):
            true, predicted = find_chunks(block.gold), find_chunks(block.predicted)
            tally.add(block, true, predicted)
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
    if tally.documents:
        warnings += _unknown_labels(tally, manifest, gold)
        report |= _describe_gold(parts) | headline.apply(tally.scores())
        report |= mistakes.summary() | {"calibration": calibration.summary()}
    else:
        warnings.append("no gold tags in the run, so there are no scores; name them with --gold FILE")
    if compare is not None:
        report["compare"] = _compare(run, compare, gold, partial)
    return report | {
        "throughput": measure_throughput([entry for part in parts.seen for entry in part.stats]),
        "lengths": lengths.summary() | {"shapes": [list(shape) for shape in manifest.shapes] if manifest else []},
        "origin": describe_origin(plan, parts.seen, manifest),
        "warnings": warnings,
    }


def _open_run(run: RunFolder, labels: Labels, gold: Path | None, partial: bool) -> tuple[Parts, Plan, list[str]]:
    plan = read_plan(run)
    shards, warnings = _shards_to_read(run, plan, partial)
    return Parts(run, shards, labels, plan.documents, GoldFile(gold, plan.unit) if gold else None), plan, warnings


def _shards_to_read(run: RunFolder, plan: Plan, partial: bool) -> tuple[list[int], list[str]]:
    planned = {shard.index: shard.documents for shard in plan.shards}
    committed = run.committed()
    missing = (planned.keys() | (run.shards() if plan.is_open else set())) - committed
    if not committed:
        raise UsageError(f"{run.uri}: no part is there yet; wait for the run, or nermill resume it")
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
        raise UsageError(f"{run.uri}: not complete: {what}; nermill resume it, or take what is there with --partial")
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


def _unknown_labels(tally: Tally, manifest: Manifest | None, gold: Path | None) -> list[str]:
    """Gold labels that the model cannot answer: an error where the person at the terminal named the gold file."""
    if manifest is None:
        return []
    known = {label.partition("-")[2] for label in manifest.labels} - {""}
    support = dict(zip(tally.labels.names, tally.conlleval[:, 0].tolist(), strict=True))
    unknown = sorted(name for name, count in support.items() if count and name not in known)
    if not unknown:
        return []
    named = ", ".join(f"{name} ({support[name]:,})" for name in unknown)
    line = f"gold has labels that the model does not know: {named}; it knows {', '.join(sorted(known))}"
    if gold is not None:
        raise UsageError(f"{gold}: {line}; rename or remove them")
    return [f"{line}; they count as missed"]


def _compare(run: RunFolder, other: RunFolder, gold: Path | None, partial: bool) -> dict[str, Any]:
    labels = Labels()
    mine, _, _ = _open_run(run, labels, gold, partial)
    theirs, plan, warnings = _open_run(other, labels, None, partial)
    found = Comparison(mine, theirs).run()
    origin = describe_origin(plan, theirs.seen, find_manifest(plan, theirs.seen))
    return {"run": other.uri, "run_id": plan.run_id, **found, "origin": origin, "warnings": warnings}
