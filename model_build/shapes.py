"""Which shapes to compile for a corpus: the text of ``--shapes``, the best K shapes of a table of costs, and the device
seconds of padded, bucketed and packed rows by it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.costs import Costs, Way, seconds_of_full_batches
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import Backend, Layout, Manifest
from nermill.worker.tagging.batching import LOOK_AHEAD, place

Shape = tuple[int, int]
Int = NDArray[np.int64]

_SHAPE = re.compile(r"(\d{1,4})x(\d{1,5})")


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


def best_shapes(lengths: Int, costs: Costs, count: int, layout: Layout = "packed") -> tuple[Shape, ...]:
    """The at most ``count`` shapes that take the fewest device seconds, batches taken as full.

    Windows go into any compiled shape that is long enough, and so into the cheapest: for a token where rows are
    packed, for a row where each holds one window. As windows grow, fewer shapes take them. The best choice therefore
    cuts the sorted lengths into stretches, one shape each: a dynamic programme over the distinct lengths.

    Args:
        lengths: Tokens of every window, int64, shape (windows,).
        costs: The shapes to choose from.
        count: How many may be compiled.
        layout: How rows are filled.

    Raises:
        UsageError: no shape of the table takes the longest window.
    """
    distinct, at = np.unique(lengths, return_inverse=True)
    weights = lengths if layout == "packed" else np.ones_like(lengths)  # what is paid for
    paid = np.concatenate([[0], np.cumsum(np.bincount(at, weights=weights))])
    price_of = costs.token_seconds if layout == "packed" else costs.row_seconds
    cheapest: list[Shape] = []
    for length in distinct.tolist():
        fitting = [shape for shape in costs.seconds if shape[1] >= length]
        if not fitting:
            raise UsageError(f"--costs {costs.name}: no shape takes a window of {length} tokens")
        cheapest.append(min(fitting, key=lambda shape: (price_of(shape), shape)))
    price = np.array([price_of(shape) for shape in cheapest])
    # seconds[n]: of the n shortest lengths; ends[n]: where the stretches end that give them
    seconds = np.full(len(distinct) + 1, np.inf)
    seconds[0] = 0.0
    ends: list[tuple[int, ...]] = [()] * len(seconds)
    for _ in range(min(count, len(distinct))):
        one_more, one_more_ends = seconds.copy(), list(ends)
        for end in range(1, len(seconds)):
            total = seconds[:end] + (paid[end] - paid[:end]) * price[end - 1]
            start = int(total.argmin())
            if total[start] < one_more[end]:
                one_more[end], one_more_ends[end] = total[start], (*ends[start], end)
        seconds, ends = one_more, one_more_ends
    return tuple(sorted({cheapest[end - 1] for end in ends[-1]}, key=lambda shape: (shape[1], shape[0])))


@dataclass(frozen=True)
class Batches:
    """What a set of shapes does with a corpus.

    Attributes:
        layout: How rows are filled.
        shapes: The compiled ones.
        calls: Batches of each shape.
        fill: Real tokens as a share of those computed.
        seconds: Device seconds, by the table of costs.
    """

    layout: Layout
    shapes: tuple[Shape, ...]
    calls: dict[Shape, int]
    fill: float
    seconds: float

    @property
    def rows(self) -> int:
        """Rows computed."""
        return sum(number * rows for (rows, _), number in self.calls.items())


def batches(lengths: Int, costs: Costs, manifest: Manifest, waiting: int = LOOK_AHEAD) -> Batches:
    """The batches that a worker makes of a corpus, once it has measured each shape, from ``waiting`` windows at a time.

    Args:
        lengths: Tokens of every window, int64, shape (windows,).
        costs: Seconds of each of the manifest's shapes.
        manifest: Its layout and its compiled shapes.
        waiting: How many windows wait, at most.
    """
    calls = dict.fromkeys(manifest.shapes, 0)
    pool, rest = lengths[:waiting], lengths[waiting:]
    while len(pool):
        placement = place(pool, manifest, costs.seconds.__getitem__)
        calls[(placement.rows, placement.length)] += 1
        taken = len(placement.window)
        pool, rest = np.concatenate([np.delete(pool, placement.window), rest[:taken]]), rest[taken:]
    computed = sum(number * rows * length for (rows, length), number in calls.items())
    return Batches(
        manifest.layout,
        manifest.shapes,
        calls,
        float(lengths.sum()) / computed,
        sum(number * costs.seconds[shape] for shape, number in calls.items()),
    )


def compare_equal(lengths: Int, costs: Costs) -> dict[Way, Batches]:
    """A corpus in rows of the longest length, and in rows of equal length without padding.

    Args:
        lengths: Tokens of every window, int64, shape (windows,).
        costs: Of a graph of layout ``equal``. A token of a window takes as long as one of the next longer rows.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    windows = dict(zip(distinct.tolist(), counts.tolist(), strict=True))
    seconds = seconds_of_full_batches(windows, costs, costs.longest, 0)
    fill: dict[Way, float] = {"padded": float(lengths.mean()) / costs.longest, "equal": 1.0}
    return {way: Batches("equal", (), {}, fill[way], taken) for way, taken in seconds.items()}


def compare(lengths: Int, costs: Costs, manifest: Manifest, count: int) -> dict[Way, Batches]:
    """A corpus in the three ways, with at most ``count`` shapes of the same table each.

    Batches are seldom quite full, so that fewer shapes than allowed may take less time.

    Args:
        lengths: Tokens of every window, int64, shape (windows,).
        costs: The shapes to choose from.
        manifest: Of the model; its layout and shapes do not count.
        count: How many may be compiled.

    Returns:
        ``padded``: one window in a row of the longest length; ``bucketed``: one in a row of the nearest compiled
        length; ``packed``: windows behind one another.

    Raises:
        UsageError: no shape of the table takes the longest window.
    """

    def made(layout: Layout, shapes: tuple[Shape, ...]) -> Batches:
        return batches(lengths, costs, replace(manifest, layout=layout, shapes=shapes))

    def best(layout: Layout) -> Batches:
        choices = {best_shapes(lengths, costs, number, layout) for number in range(1, count + 1)}
        return min((made(layout, shapes) for shapes in sorted(choices)), key=lambda made: made.seconds)

    bucketed, packed = best("plain"), best("packed")
    longest = min((shape for shape in costs.seconds if shape[1] == costs.longest), key=costs.row_seconds)
    return {"padded": made("plain", (longest,)), "bucketed": bucketed, "packed": packed}
