"""What ``nermill-build shapes`` says: the shapes to compile, the fill to expect, devices for a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.model_build.corpus import encode, read_texts
from nermill.model_build.shapes import Costs, Packing, best_shapes, bucket, load_costs, packing
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest, load_manifest
from nermill.worker.tagging.batching import LOOK_AHEAD
from nermill.worker.tagging.windows import split_into_windows

OVERLAP = 64  # tokens that windows of a long text share, as in a run


def advise(
    inputs: Sequence[str], count: int, table: str, artifact: Path, target: float | None
) -> tuple[dict[str, Any], list[str]]:
    """Reads a corpus and chooses at most ``count`` shapes for it.

    Args:
        inputs: Files of the corpus.
        count: Shapes to compile at most.
        table: Name or file of the costs.
        artifact: Whose tokenizer and longest window count.
        target: Documents a second that are wanted.

    Returns:
        A JSON object, and its lines for a person.

    Raises:
        UsageError: an input or the table cannot be read, or no shape takes the longest window.
    """
    costs = load_costs(table)
    manifest = load_manifest(artifact)
    longest = min(manifest.max_length, max(length for _, length in costs.seconds))
    texts, windows = _window_lengths(inputs, artifact, longest)
    # rows are never quite full: more shapes than help are not compiled
    choices = {best_shapes(windows, costs, number) for number in range(1, count + 1)}
    chosen = min((packing(windows, costs, shapes, LOOK_AHEAD) for shapes in sorted(choices)), key=lambda p: p.seconds)
    padded = _padded_seconds(windows, costs)
    bucketed = bucket(windows, costs)
    rate = texts / chosen.seconds
    body = {
        **_describe(chosen),
        "documents": texts,
        "windows": len(windows),
        "tokens": int(windows.sum()),
        "documents_per_second": round(rate, 1),
        "one_a_row": {
            "length": max(length for _, length in costs.seconds),
            "fill": round(float(windows.mean()) / max(length for _, length in costs.seconds), 4),
            "documents_per_second": round(texts / padded, 1),
        },
        "nearest_bucket": {
            "lengths": bucketed.lengths,
            "fill": round(bucketed.fill, 4),
            "documents_per_second": round(texts / bucketed.seconds, 1),
        },
        "costs": {"name": costs.name, "kind": costs.kind, "source": costs.source},
        "devices": math.ceil(target / rate) if target else None,
    }
    return body, _lines(body, manifest, target)


def _window_lengths(inputs: Sequence[str], artifact: Path, longest: int) -> tuple[int, NDArray[np.int64]]:
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    texts = read_texts(inputs)
    counts = np.array([len(ids) for ids, _ in encode(tokenizer, texts)], np.int64)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return len(texts), split_into_windows(bounds, longest, OVERLAP).lengths


def _padded_seconds(windows: NDArray[np.int64], costs: Costs) -> float:
    """Every window alone in a row of the longest shape, at the batch size that is best for it."""
    length = max(length for _, length in costs.seconds)
    return len(windows) * min(seconds / rows for (rows, n), seconds in costs.seconds.items() if n == length)


def _describe(chosen: Packing) -> dict[str, Any]:
    return {
        "shapes": [{"rows": r, "length": n, "calls": chosen.calls[(r, n)]} for r, n in chosen.shapes],
        "rows": chosen.rows,
        "fill": round(chosen.fill, 4),
        "device_seconds": round(chosen.seconds, 3),
    }


def _lines(body: dict[str, Any], manifest: Manifest, target: float | None) -> list[str]:
    shapes = ",".join(f"{s['rows']}x{s['length']}" for s in body["shapes"])
    word = "estimate" if body["costs"]["kind"] == "estimate" else "measured"
    alone = body["one_a_row"]
    padded = f"{alone['documents_per_second']:,.1f} documents/s ({word})"
    nearest = body["nearest_bucket"]
    buckets = f"{nearest['documents_per_second']:,.1f} documents/s ({word}), full batches of rows of "
    lines = [
        f"compile      --shapes {shapes}",
        f"corpus       {body['documents']:,} documents, {body['windows']:,} windows, {body['tokens']:,} tokens "
        f"({manifest.name}'s tokenizer)",
        f"packed       {body['rows']:,} rows, fill {body['fill']:.1%}, {body['device_seconds']:,.1f} device seconds, "
        f"{body['documents_per_second']:,.1f} documents/s ({word})",
        f"pad to {alone['length']:<5} fill {alone['fill']:.1%}, {padded}",
        f"bucketed     fill {nearest['fill']:.1%}, {buckets}{', '.join(map(str, nearest['lengths']))}",
        f"costs        {body['costs']['name']}: {body['costs']['source']}",
    ]
    if target:
        lines.insert(3, f"devices      {body['devices']} for {target:,.0f} documents/s ({word})")
    return lines
