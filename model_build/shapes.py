"""Which shapes to compile for a corpus: the text of ``--shapes``, tables of costs, and the best K shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import Backend

Shape = tuple[int, int]
Int = NDArray[np.int64]

_SHAPE = re.compile(r"(\d{1,4})x(\d{1,5})")
_TABLES = files("nermill.model_build").joinpath("costs")


def parse_shapes(text: str, max_length: int, backend: Backend) -> tuple[Shape, ...]:
    """Reads ``auto`` or ``BxL,...``; an empty tuple means that shapes are free.

    Raises:
        UsageError: the text does not parse, or a shape is longer than the model reads.
    """
    from nermill.model_build import aie

    if text == "auto":
        return aie.default_shapes(max_length) if backend == "aie" else ()
    shapes = []
    for entry in text.split(","):
        match = _SHAPE.fullmatch(entry.strip())
        if not match or "0" in match.groups():
            raise UsageError(f"--shapes {entry!r}: write auto, or rows x length like 32x64,8x512")
        rows, length = int(match[1]), int(match[2])
        if length > max_length:
            raise UsageError(f"--shapes {entry.strip()}: the model reads at most {max_length} tokens")
        if length < 3:
            raise UsageError(f"--shapes {entry.strip()}: two special tokens and a word need a length of 3")
        shapes.append((rows, length))
    if len(set(shapes)) < len(shapes):
        raise UsageError(f"--shapes {text}: a shape is there twice")
    if backend == "aie":
        aie.check_shapes(tuple(shapes))
    return tuple(shapes)


@dataclass(frozen=True)
class Costs:
    """Seconds of one call of each shape.

    Attributes:
        name: Of the table.
        kind: ``estimate`` where the numbers are somebody else's, ``measured`` where ``bench`` took them.
        source: Where they come from.
        seconds: By shape.
    """

    name: str
    kind: str
    source: str
    seconds: dict[Shape, float]

    def token_seconds(self, shape: Shape) -> float:
        """Seconds of one token of a full batch."""
        return self.seconds[shape] / (shape[0] * shape[1])


def load_costs(table: str) -> Costs:
    """Reads a shipped table by its name, or a file that ``bench --json`` wrote.

    Raises:
        UsageError: there is no such table, or it cannot be read.
    """
    shipped = {Path(entry.name).stem: entry for entry in _TABLES.iterdir() if entry.name.endswith(".json")}
    try:
        text = shipped[table].read_text("utf-8") if table in shipped else Path(table).read_text("utf-8")
        body: dict[str, Any] = json.loads(text)
        seconds = {(int(e["rows"]), int(e["length"])): float(e["seconds"]) for e in body["shapes"] if "seconds" in e}
        costs = Costs(table, str(body["kind"]), str(body["source"]), seconds)
    except OSError:
        raise UsageError(f"--costs {table}: no such table; shipped are {', '.join(sorted(shipped))}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--costs {table}: not a table of costs ({error}); bench --json writes one") from None
    if not seconds:
        raise UsageError(f"--costs {table}: names no shape")
    return costs


def best_shapes(lengths: Int, costs: Costs, count: int) -> tuple[Shape, ...]:
    """The at most ``count`` shapes that take the fewest device seconds, rows taken as full.

    Windows go into any compiled shape that is long enough, and so into the cheapest for a token; as windows
    grow, fewer shapes take them. The best choice therefore cuts the sorted lengths into stretches, one shape
    each: a dynamic programme over the distinct lengths.

    Args:
        lengths: Tokens of every window, int64, shape (windows,).
        costs: The shapes to choose from.
        count: How many may be compiled.

    Raises:
        UsageError: no shape of the table takes the longest window.
    """
    distinct, at = np.unique(lengths, return_inverse=True)
    tokens = np.concatenate([[0], np.cumsum(np.bincount(at, weights=lengths))])
    cheapest: list[Shape] = []
    for length in distinct.tolist():
        fitting = [shape for shape in costs.seconds if shape[1] >= length]
        if not fitting:
            raise UsageError(f"--costs {costs.name}: no shape takes a window of {length} tokens")
        cheapest.append(min(fitting, key=lambda shape: (costs.token_seconds(shape), shape)))
    price = np.array([costs.token_seconds(shape) for shape in cheapest])
    # seconds[n]: of the n shortest lengths; ends[n]: where the stretches end that give them
    seconds = np.full(len(distinct) + 1, np.inf)
    seconds[0] = 0.0
    ends: list[tuple[int, ...]] = [()] * len(seconds)
    for _ in range(min(count, len(distinct))):
        one_more, one_more_ends = seconds.copy(), list(ends)
        for end in range(1, len(seconds)):
            total = seconds[:end] + (tokens[end] - tokens[:end]) * price[end - 1]
            start = int(total.argmin())
            if total[start] < one_more[end]:
                one_more[end], one_more_ends[end] = total[start], (*ends[start], end)
        seconds, ends = one_more, one_more_ends
    return tuple(sorted({cheapest[end - 1] for end in ends[-1]}, key=lambda shape: (shape[1], shape[0])))


@dataclass(frozen=True)
class Packing:
    """What a set of shapes does with a corpus.

    Attributes:
        shapes: The compiled ones.
        calls: Batches of each shape.
        rows: Rows computed.
        fill: Real tokens as a share of those computed.
        seconds: Device seconds, by the table of costs.
    """

    shapes: tuple[Shape, ...]
    calls: dict[Shape, int]
    rows: int
    fill: float
    seconds: float


def packing(lengths: Int, costs: Costs, shapes: Sequence[Shape], waiting: int) -> Packing:
    """Packs a corpus as the worker does, ``waiting`` windows of the stream in view at a time.

    Full rows are what ``best_shapes`` counts on; this is what comes of it.
    """
    from nermill.worker.tagging.batching import pack

    calls = dict.fromkeys(shapes, 0)
    pool, rest = lengths[:waiting], lengths[waiting:]
    while len(pool):
        fitting = [shape for shape in shapes if shape[1] >= pool[0]]
        placements = [pack(pool, shape) for shape in fitting]
        chosen = min(placements, key=lambda p: costs.seconds[(p.rows, p.length)] / float(pool[p.window].sum()))
        calls[(chosen.rows, chosen.length)] += 1
        kept = np.ones(len(pool), bool)
        kept[chosen.window] = False
        taken = len(chosen.window)
        pool, rest = np.concatenate([pool[kept], rest[:taken]]), rest[taken:]
    computed = sum(number * rows * length for (rows, length), number in calls.items())
    return Packing(
        tuple(shapes),
        calls,
        sum(number * rows for (rows, _), number in calls.items()),
        float(lengths.sum()) / computed,
        sum(number * costs.seconds[shape] for shape, number in calls.items()),
    )


@dataclass(frozen=True)
class Bucketing:
    """Windows padded to the nearest bucket, one a row.

    Attributes:
        lengths: The buckets that windows went into.
        fill: Real tokens as a share of those computed.
        seconds: Device seconds, by the table of costs, every batch taken as full.
    """

    lengths: list[int]
    fill: float
    seconds: float


def bucket(lengths: Int, costs: Costs) -> Bucketing:
    """Pads each window to the shortest length of the table that takes it, at the number of rows best for that length.

    Raises:
        UsageError: no shape of the table takes the longest window.
    """
    row_seconds: dict[int, float] = {}
    for (rows, length), seconds in costs.seconds.items():
        row_seconds[length] = min(seconds / rows, row_seconds.get(length, np.inf))
    buckets = np.array(sorted(row_seconds))
    if lengths.max() > buckets[-1]:
        raise UsageError(f"--costs {costs.name}: no shape takes a window of {lengths.max()} tokens")
    used, rows_of = np.unique(buckets[np.searchsorted(buckets, lengths)], return_counts=True)
    seconds = sum(int(number) * row_seconds[int(n)] for n, number in zip(used, rows_of, strict=True))
    return Bucketing(used.tolist(), float(lengths.sum() / (used * rows_of).sum()), seconds)
