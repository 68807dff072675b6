"""What ``nermill-build shapes`` says: the shapes to compile, the three ways to fill their rows, devices for a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.model_build.corpus import Text, encode, read_texts
from nermill.model_build.shapes import Batches, compare
from nermill.worker.contracts.costs import Way, load_costs
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest, load_manifest
from nermill.worker.tagging.windows import split_into_windows

OVERLAP = 64  # tokens that windows of a long text share, as in a run


def advise(
    inputs: Sequence[str], count: int, table: str, artifact: Path, target: float | None, unit: str = "sentence"
) -> tuple[dict[str, Any], list[str]]:
    """Reads a corpus and chooses at most ``count`` shapes for it.

    Args:
        inputs: Files of the corpus.
        count: Shapes to compile at most.
        table: Name or file of the costs.
        artifact: Whose tokenizer and longest window count.
        target: Documents a second that are wanted.
        unit: What a document of CoNLL is: ``sentence`` or ``document``.

    Returns:
        A JSON object, and its lines for a person.

    Raises:
        UsageError: an input or the table cannot be read, the table is of a graph of layout ``equal``, or no shape takes
            the longest window.
    """
    costs, manifest, texts = load_costs(table), load_manifest(artifact), read_texts(inputs, unit)
    if costs.layout == "equal":
        raise UsageError(f"--costs {table}: its graph takes every length without padding: no shapes to choose")
    windows = window_lengths(texts, artifact, min(manifest.max_length, costs.longest))
    ways = compare(windows, costs, manifest, count)
    described = describe(ways, len(texts))
    packed = ways["packed"]
    rate = len(texts) / packed.seconds
    body = {
        "shapes": [{"rows": r, "length": n, "calls": packed.calls[(r, n)]} for r, n in packed.shapes],
        "rows": packed.rows,
        "fill": round(packed.fill, 4),
        "device_seconds": round(packed.seconds, 3),
        "documents": len(texts),
        "windows": len(windows),
        "tokens": int(windows.sum()),
        "documents_per_second": round(rate, 1),
        "ways": described,
        "costs": {"name": costs.name, "kind": costs.kind, "source": costs.source},
        "devices": math.ceil(target / rate) if target else None,
    }
    return body, _lines(body, manifest, target)


def window_lengths(texts: Sequence[Text], artifact: Path, longest: int) -> NDArray[np.int64]:
    """Tokens of each window of the texts, special tokens included, by the artifact's tokenizer; shape (windows,)."""
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    counts = np.array([len(ids) for ids, _ in encode(tokenizer, texts)], np.int64)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return split_into_windows(bounds, longest, OVERLAP).lengths


def describe(ways: dict[Way, Batches], documents: int) -> dict[str, Any]:
    """The ways as JSON: shapes, rows, fill, device seconds and documents a second of each."""
    return {
        way: {
            **({"shapes": [list(shape) for shape in made.shapes], "rows": made.rows} if made.shapes else {}),
            "fill": round(made.fill, 4),
            "device_seconds": round(made.seconds, 4),
            "documents_per_second": round(documents / made.seconds, 1),
        }
        for way, made in ways.items()
    }


def lines_of_ways(ways: dict[str, Any], word: str) -> list[str]:
    """The ways for a person, the best use of the table first.

    Args:
        ways: Of ``describe``.
        word: What the seconds are: ``estimate`` or ``measured``.
    """
    lines = []
    for way in reversed(ways):
        about = ways[way]
        shapes = ",".join(f"{rows}x{length}" for rows, length in about.get("shapes", ()))
        rows = f"{about['rows']:,} rows of {shapes}, " if shapes else ""
        lines.append(
            f"{way:<12} {rows}fill {about['fill']:.1%}, "
            f"{about['device_seconds']:,.1f} device seconds, {about['documents_per_second']:,.1f} documents/s ({word})"
        )
    return lines


def _lines(body: dict[str, Any], manifest: Manifest, target: float | None) -> list[str]:
    shapes = ",".join(f"{s['rows']}x{s['length']}" for s in body["shapes"])
    word = "estimate" if body["costs"]["kind"] == "estimate" else "measured"
    lines = [
        f"compile      --shapes {shapes}",
        f"corpus       {body['documents']:,} documents, {body['windows']:,} windows, {body['tokens']:,} tokens "
        f"({manifest.name}'s tokenizer)",
        *lines_of_ways(body["ways"], word),
        f"costs        {body['costs']['name']}: {body['costs']['source']}",
    ]
    if target:
        lines.insert(3, f"devices      {body['devices']} for {target:,.0f} documents/s ({word})")
    return lines
