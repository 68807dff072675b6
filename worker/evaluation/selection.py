"""Applies an evaluation's label options to a run's entities, and explains labels that only gold or the model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice, nested, suggest_map
from nermill.worker.evaluation.chunks import LabelIndex, find_chunks, read_tags


def choose_entities(rows: pa.RecordBatch, labels: LabelIndex) -> pa.RecordBatch:
    """Removes the entities that are left out; their tags become ``O`` where the score is too low.

    Args:
        rows: Documents with ``doc_id``, ``entities`` and ``tags``.
        labels: Its ``choice`` says which entities stay; its ``changes`` counts those below the score. Tags whose label
            is left out stay, since ``read_tags`` ignores them.

    Raises:
        UsageError: a document's entities do not correspond to its tags (aggregation none or simple), so that tags have
            no score.
    """
    choice = labels.choice
    lists: Any = rows["entities"]
    entities, counts = lists.flatten(), pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    names = entities.field("label").to_pylist()
    named = np.fromiter((bool(choice.target(name)) for name in names), np.bool_, len(names))
    sure = entities.field("score").to_numpy(zero_copy_only=False) >= np.float32(choice.min_score)
    labels.changes.update(f"predicted.below_min_score.{names[at]}" for at in np.flatnonzero(named & ~sure))
    kept = named & sure
    document = np.repeat(np.arange(len(lists)), counts)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(document[kept], minlength=len(lists)))])
    chosen = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), entities.filter(pa.array(kept)))
    if not sure.all():
        rows = _replaced(rows, "tags", _sure_tags(rows, counts, sure))
    return _replaced(rows, "entities", chosen)


def _sure_tags(rows: pa.RecordBatch, counts: np.ndarray[Any, Any], sure: np.ndarray[Any, Any]) -> pa.Array[Any]:
    tags = rows["tags"].to_pylist()
    first = np.cumsum(counts) - counts
    for row in sorted(set(np.repeat(np.arange(len(tags)), counts)[~sure].tolist())):
        if tags[row] is None:
            continue
        flat = pa.array(tags[row], pa.string())
        chunks = find_chunks(read_tags(flat, np.array([0, len(flat)]), LabelIndex(), normalise=False))
        if len(chunks) != counts[row]:
            raise UsageError(
                f"document {rows['doc_id'][row].as_py()!r} has {counts[row]} entities for {len(chunks)} tagged spans; "
                "--min-score needs a run with --aggregation first, average or max"
            )
        for at in np.flatnonzero(~sure[first[row] : first[row] + counts[row]]):
            start, end = int(chunks.start[at]), int(chunks.end[at])
            tags[row][start:end] = ["O"] * (end - start)
    return pa.array(tags, pa.list_(pa.string()))


def _replaced(rows: pa.RecordBatch, name: str, column: pa.Array[Any]) -> pa.RecordBatch:
    return rows.set_column(rows.schema.get_field_index(name), name, column)


def describe_choice(choices: Iterable[LabelChoice], changes: Counter[str]) -> tuple[dict[str, Any], list[str]]:
    """The report's object ``labels``, and a warning about entities that were left out.

    Args:
        choices: The run's choice, then the evaluation's.
        changes: Counter of label changes, of both.
    """
    run, here = choices
    found = nested(changes)
    shown = {"map": dict(run.map), "only": list(run.only), "min_score": run.min_score}
    if not here.is_all:
        shown["evaluation"] = {"map": dict(here.map), "only": list(here.only), "min_score": here.min_score}
    gone = [
        f"{side} {label} ({count:,})" + (" below the score" if what == "below_min_score" else "")
        for side, done in found.items()
        for what in ("left_out", "below_min_score")
        for label, count in done.get(what, {}).items()
    ]
    return shown | found, [f"left out by options: {', '.join(gone)}"] if gone else []


def explain_labels(run: str, support: dict[str, int], known: list[str], f1: float) -> str:
    """A message about gold labels that the model does not have, with a command that maps them; empty for none.

    Args:
        run: The run's folder or URI.
        support: Number of gold entities by label.
        known: The model's labels.
        f1: F1 of the run.
    """
    unknown = sorted(name for name, count in support.items() if count and name not in known)
    if not unknown:
        return ""
    named = ", ".join(f"{name} ({support[name]:,})" for name in unknown)
    line = f"gold has labels that the model does not have: {named}; it has {', '.join(sorted(known))}"
    command = f"nermill evaluate {run} {suggest_map(unknown, sorted(known))}"
    shared = any(count for name, count in support.items() if name in known)
    why = "; they count as missed" if shared or f1 else "; no label is in both, so F1 is 0"
    return f"{line}{why}; to compare them: {command}"
