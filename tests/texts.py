"""Runs over texts for tests: parts as a worker writes them, with given entities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet as pq

from nermill.worker.contracts.document import Document
from nermill.worker.contracts.layout import SUCCESS_FILE, RunFolder, part_name
from nermill.worker.contracts.plan import Options, Plan, Shard
from nermill.worker.contracts.schema import part_schema, with_metadata
from nermill.worker.contracts.shard import encode_shard, shard_table

Span = tuple[int, int, str] | tuple[int, int, str, float]
Made = tuple[str, Sequence[Span]]  # a text and its entities


def make_run(
    folder: Path | str,
    documents: Sequence[Made | None],
    *,
    per_shard: int = 100,
    keep_text: bool = True,
    run_id: str = "made",
    missing: int = 0,
) -> RunFolder:
    """Writes a run over texts.

    Args:
        folder: Folder or URI that contains the run.
        documents: Texts with their entities; None for a rejected document.
        per_shard: Documents of a part.
        keep_text: Whether the texts are in the parts, or in the shards alone.
        run_id: The run's id.
        missing: Number of parts at the end that are left out.
    """
    run = RunFolder(f"{folder}/run={run_id}")
    shards = []
    for index, first in enumerate(range(0, len(documents), per_shard)):
        some = documents[first : first + per_shard]
        rows = [_row(number, made) for number, made in enumerate(some, first)]
        texts = [Document(row["doc_id"], text=row["text"] or "") for row in rows]
        data, sha256 = encode_shard(shard_table(texts))
        shards.append(Shard(index, first, len(some), sha256))
        if not keep_text:
            run.write(run.shard_file(index), data)
        schema = with_metadata(part_schema(keep_text=keep_text, keep_fields=False), run_id=run_id, model="stand-in")
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")
        run.write(part_name(index), sink.getvalue().to_pybytes())
    for shard in shards[len(shards) - missing :]:
        run.remove(part_name(shard.index))
    options = Options(keep_text=keep_text)
    model = {"name": "stand-in", "sha256": ""}
    Plan(run_id, "2026-01-01T00:00:00Z", model, options, (), tuple(shards)).write(run)
    if not missing:
        run.write(SUCCESS_FILE, b"")
    return run


def _row(number: int, made: Made | None) -> dict:
    text, spans = made or ("never tagged", ())
    entities = [
        {"start": start, "end": end, "label": label, "text": text[start:end], "score": score[0] if score else 0.9}
        for start, end, label, *score in spans
    ]
    return {
        "doc_index": number,
        "doc_id": f"d{number}",
        "n_chars": len(text),
        "n_tokens": len(text.split()),
        "n_windows": 1,
        "status": "ok" if made else "rejected",
        "entities": entities,
        "text": text,
    }
