"""Runs for tests: parts with given tags, entities and measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.plan import Options, Plan, Shard
from nermill.worker.contracts.schema import part_schema, with_metadata
from nermill.worker.evaluation.chunks import LabelIndex, find_chunks, read_tags

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@dataclass(frozen=True)
class Doc:
    """One document of a run; ``tags`` is None for a rejected document."""

    words: Sequence[str] | None
    tags: Sequence[str] | None
    gold: Sequence[str] | None
    scores: Sequence[float] = ()
    id: str = ""


def entities_of(words: Sequence[str], tags: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """The entities that a worker writes for these tags."""
    labels = LabelIndex()
    import numpy as np

    chunks = find_chunks(read_tags(pa.array(tags, pa.string()), np.array([0, len(tags)]), labels, normalise=False))
    begin = list(accumulate((len(word) + 1 for word in words), initial=0))
    text = " ".join(words)
    found = []
    for n, (first, last, label) in enumerate(zip(chunks.start, chunks.end, chunks.label, strict=True)):
        start, end = begin[first], begin[last] - 1
        score = scores[n] if n < len(scores) else 0.9
        found.append(
            {"start": start, "end": end, "label": labels.names[label], "text": text[start:end], "score": score}
        )
    return found


def stats_of(shard: int, documents: int, **given: Any) -> dict[str, Any]:
    """A worker's measurements for one shard that takes a second."""
    return {
        "documents": documents,
        "ok": documents,
        "rejected": 0,
        "tokens": 20 * documents,
        "computed_tokens": 25 * documents,
        "windows": documents,
        "device": "cpu",
        "worker": "w0",
        "host": "here",
        "claimed": 1000.0 + shard,
        "finished": 1001.0 + shard,
        "queue_seconds": 0.01,
        "tokenize_seconds": 0.1,
        "wait_seconds": 0.2,
        "compute_seconds": 0.5,
        "decode_seconds": 0.1,
        "attempts": 1,
        **given,
    }


def write_part(
    run: RunFolder, shard: int, first: int, docs: Sequence[Doc], stats: Any = None, artifact: str = "0" * 64
) -> None:
    """One part, as a worker writes it."""
    rows = []
    for index, doc in enumerate(docs, first):
        words, tags = doc.words, doc.tags
        rows.append(
            {
                "doc_index": index,
                "doc_id": doc.id or f"doc:{index}",
                "n_chars": len(" ".join(words or ())),
                "n_tokens": 0 if words is None else len(words) + 2,
                "n_windows": 1,
                "status": "rejected" if tags is None else "ok",
                "entities": entities_of(words, tags, doc.scores) if words is not None and tags is not None else [],
                "words": words,
                "tags": tags,
                "gold_tags": doc.gold,
            }
        )
    measured = stats_of(shard, len(docs)) if stats is None else stats
    schema = with_metadata(
        part_schema(keep_text=False, keep_fields=False),
        run_id="made",
        shard=str(shard),
        model="demo",
        artifact_sha256=artifact,
        aggregation="first",
        stats=json.dumps(measured),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    run.write(part_name(shard), sink.getvalue().to_pybytes())


def make_run(
    folder: Path,
    docs: Sequence[Doc],
    *,
    per_shard: int = 100,
    unit: str = "sentence",
    model: str = "",
    artifact: str = "0" * 64,
) -> RunFolder:
    """A complete run over the documents."""
    run = RunFolder(str(folder / "run=made"))
    shards = []
    for index, first in enumerate(range(0, len(docs), per_shard)):
        some = docs[first : first + per_shard]
        write_part(run, index, first, some, artifact=artifact)
        shards.append(Shard(index, first, len(some), "0" * 64))
    named = {"name": model, "sha256": artifact if model else ""}
    Plan("made", "2026-01-01T00:00:00Z", named, Options(), (), tuple(shards), unit, has_gold=True).write(run)
    return run


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences of a CoNLL file as words and raw tags."""
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for line in path.read_text("utf-8").splitlines():
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if sentences[-1][0]:
                sentences.append(([], []))
            continue
        sentences[-1][0].append(columns[0])
        sentences[-1][1].append(columns[-1])
    return [s for s in sentences if s[0]]
