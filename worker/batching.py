"""Windows to batches: which windows go together, and where each one lies; pure functions over lengths.

A compiled accelerator wants fixed shapes and windows come in every length, so windows are *packed*: laid one
behind another into rows of a compiled shape (Krell et al., Efficient Sequence Packing without
Cross-contamination, arXiv:2107.02027). Where shapes are free, windows of similar length share a batch under a
budget of padded tokens. Which of the two, the artifact says.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from worker.contracts.manifest import Manifest

Int = NDArray[np.int64]
Shape = tuple[int, int]

ROUND_LENGTHS = (64, 128, 256, 512)
ACCELERATOR_LEAST = 350  # tokens of a batch under which an accelerator waits for its memory
CPU_LEAST = 128  # the same for a CPU, which keeps busy with few


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the windows of one batch lie.

    Attributes:
        rows, length: Shape of the batch.
        window: Which windows, as positions in the lengths that were offered; int64, shape (n,).
        row, column: Where each one begins; int64, shape (n,).
    """

    rows: int
    length: int
    window: Int
    row: Int
    column: Int


def place(lengths: Int, manifest: Manifest) -> Placement:
    """Chooses the next batch from the waiting windows, the oldest of them always included.

    Args:
        lengths: Length in tokens of every waiting window, oldest first; int64, shape (n,), n > 0.
        manifest: Says which shapes the model takes, and whether rows may be packed.
    """
    if manifest.shapes:
        shapes = [shape for shape in manifest.shapes if shape[1] >= lengths[0]]
    elif manifest.layout == "packed":
        shapes = free_shapes(int(lengths[0]), manifest.token_budget)
    else:
        return place_similar(lengths, manifest.token_budget)
    choose = pack if manifest.layout == "packed" else place_one_a_row
    placements = [choose(lengths, shape) for shape in shapes]
    if not manifest.shapes:
        placements = [trim(placement, lengths) for placement in placements]
    return max(placements, key=lambda p: (int(lengths[p.window].sum()) / cost((p.rows, p.length)), -p.rows * p.length))


def cost(shape: Shape) -> float:
    """Relative time of one call of a shape: its tokens, plus attention, which grows with the square of a row.

    A token of a BERT of width H costs 24 H² FLOP a layer in matrix products and 4 H FLOP times the row's length in
    attention: a share of length ÷ 6 H, taken here for H = 768. No batch counts for less than ACCELERATOR_LEAST tokens.
    """
    rows, length = shape
    return float(costs(np.array(rows), np.array(length)))


def costs(rows: Int, length: Int, least: int = ACCELERATOR_LEAST) -> NDArray[np.float64]:
    """``cost`` of many shapes at once; no batch counts for less than ``least`` tokens."""
    return np.asarray(np.maximum(rows * length, least) * (1 + length / (6 * 768)))


def free_shapes(oldest: int, budget: int) -> list[Shape]:
    """Shapes worth a try where any is free: rows as short as the oldest window, or of some round length above it.

    Short rows spare attention, long ones leave room to close every gap; what waits decides which is cheaper.
    """
    lengths = {oldest, *(length for length in ROUND_LENGTHS if oldest <= length <= budget)}
    return [(max(1, budget // length), length) for length in sorted(lengths)]


def trim(placement: Placement, lengths: Int) -> Placement:
    """Cuts off the rows and columns that nothing lies in."""
    used = int((placement.column + lengths[placement.window]).max())
    return replace(placement, rows=int(placement.row.max()) + 1, length=used)


def place_similar(lengths: Int, budget: int) -> Placement:
    """A batch of similar lengths, one window a row, of at most ``budget`` padded tokens (but at least one window).

    Sorted by length, every batch is a stretch that begins with its longest window and ends with the budget, or
    where windows are a twentieth shorter; among those that hold the oldest one, the stretch with the most real
    tokens for its cost is taken.
    """
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    oldest = int(np.flatnonzero(order == 0)[0])
    begin = np.arange(oldest + 1)
    end = np.minimum(begin + np.maximum(1, budget // falling[begin]), len(order))
    alike = np.minimum(end, np.searchsorted(-falling, -0.95 * falling[begin], side="right"))
    begin, end = np.tile(begin, 2), np.concatenate([end, alike])
    begin, end = begin[end > oldest], end[end > oldest]
    tokens = np.concatenate([np.zeros(1, np.int64), np.cumsum(falling)])
    best = int(((tokens[end] - tokens[begin]) / costs(end - begin, falling[begin], least=CPU_LEAST)).argmax())
    window = order[begin[best] : end[best]]
    row = np.arange(len(window))
    return Placement(len(window), int(lengths[window].max()), window, row, np.zeros_like(row))


def place_one_a_row(lengths: Int, shape: Shape) -> Placement:
    """A batch of a fixed shape with one window a row: the oldest, then those that fill a row best."""
    rows, length = shape
    others = np.flatnonzero(lengths[1:] <= length) + 1
    longest = others[np.argsort(-lengths[others], kind="stable")]
    window = np.concatenate([np.zeros(1, np.int64), longest])[:rows]
    row = np.arange(len(window))
    return Placement(rows, length, window, row, np.zeros_like(row))


def pack(lengths: Int, shape: Shape) -> Placement:
    """Packs windows into the rows of a fixed shape; each row takes the longest that still fits, again and again."""
    rows, length = shape
    waiting = _Waiting(lengths)
    window: list[int] = []
    row: list[int] = []
    column: list[int] = []
    for number in range(rows):
        filled = 0
        while True:
            chosen = waiting.pop(0) if not window else waiting.pop_longest(length - filled)
            if chosen is None:
                break
            window.append(chosen)
            row.append(number)
            column.append(filled)
            filled += int(lengths[chosen])
        if not filled:
            break
    return Placement(rows, length, np.array(window, np.int64), np.array(row, np.int64), np.array(column, np.int64))


class _Waiting:
    """Waiting windows by length, oldest first within a length; a pop costs a bisection over distinct lengths."""

    def __init__(self, lengths: Int) -> None:
        order = np.argsort(lengths, kind="stable")[::-1]  # reversed, so that pop() gives the oldest of a length
        self._lengths = lengths
        self._by_length: dict[int, list[int]] = {}
        for window, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
            self._by_length.setdefault(size, []).append(window)
        self._distinct = sorted(self._by_length)

    def pop(self, window: int) -> int:
        """Takes one window out."""
        size = int(self._lengths[window])
        self._by_length[size].remove(window)
        self._drop_if_empty(size)
        return window

    def pop_longest(self, limit: int) -> int | None:
        """Takes out the oldest among the longest windows of at most ``limit`` tokens."""
        at = bisect_right(self._distinct, limit) - 1
        if at < 0:
            return None
        size = self._distinct[at]
        window = self._by_length[size].pop()
        self._drop_if_empty(size)
        return window

    def _drop_if_empty(self, size: int) -> None:
        if not self._by_length[size]:
            self._distinct.remove(size)


def spread(starts: Int, counts: Int) -> Int:
    """Positions ``starts[i], starts[i] + 1, …`` for ``counts[i]`` steps each, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    shifts: Int = np.repeat(starts - (ends - counts), counts)
    return shifts + np.arange(total)
