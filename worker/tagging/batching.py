"""Chooses which windows form the next batch, and the position of each window in it; pure functions over lengths.

There are three methods, and the artifact's manifest says which one its graph takes:

- Layout ``packed``: several windows are placed one behind another in a row. A compiled accelerator graph has fixed
  shapes and windows have every length, so packing avoids most padding (Krell et al., Efficient Sequence Packing
  without Cross-contamination, arXiv:2107.02027).
- Layout ``plain``: one window a row. Where shapes are free, windows of similar length share a batch that has at most
  ``token_budget`` tokens, padding included.
- Layout ``equal``: one window a row, and all of a batch have the same length. A CPU takes about as long for a token of
  a small batch as of a large one, so it needs neither padding nor packing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nermill.worker.contracts.manifest import Manifest

Int = NDArray[np.int64]
Shape = tuple[int, int]

ROUND_LENGTHS = (64, 128, 256, 512)
LOOK_AHEAD = 512  # windows that a packed batch is chosen from, at least; sentences of CoNLL-2003 then fill 99.4 %
# In a BERT of width H, a token costs 24 H² FLOP a layer in matrix products and 4 H FLOP times the row's length in
# attention. The ratio of the two is length / (6 H); H is taken as 768.
ATTENTION_SHARE = 1 / (6 * 768)
ACCELERATOR_MIN_TOKENS = 350  # a smaller batch takes as long as this one: reading the weights from memory dominates
CPU_MIN_TOKENS = 128  # the same for a CPU


@dataclass(frozen=True, slots=True)
class Placement:
    """The windows of one batch and their positions in it.

    Attributes:
        rows, length: Shape of the batch.
        tokens: Number of tokens that are not padding.
        window: The windows, as indices into the lengths that were passed in; int64, shape (n,).
        row, column: Position of each window's first token; int64, shape (n,).
    """

    rows: int
    length: int
    tokens: int
    window: Int
    row: Int
    column: Int

    def reordered(self, order: Int) -> Placement:
        """The same batch with its windows listed in another order.

        Args:
            order: A permutation; int64, shape (n,).
        """
        return replace(self, window=self.window[order], row=self.row[order], column=self.column[order])


def cost(shape: Shape) -> float:
    """Estimated time of one call with a shape, in units of one token of a very short row.

    It is proportional to the number of tokens; attention adds a share that grows with the row's length. A batch of
    fewer than ACCELERATOR_MIN_TOKENS tokens costs as much as one of that many.
    """
    rows, length = shape
    return max(rows * length, ACCELERATOR_MIN_TOKENS) * (1 + length * ATTENTION_SHARE)


def place(lengths: Int, manifest: Manifest, cost: Callable[[Shape], float] = cost) -> Placement:
    """Chooses the next batch from the waiting windows; the oldest window is always part of it.

    Args:
        lengths: Length in tokens of every waiting window, oldest first; int64, shape (n,), n > 0.
        manifest: Which shapes the model takes, and whether rows may be packed.
        cost: Time of one call with a shape, in any unit.
    """
    if manifest.layout == "equal":
        return place_equal(lengths, manifest.token_budget)
    if manifest.shapes:
        shapes = [shape for shape in manifest.shapes if shape[1] >= lengths[0]]
    elif manifest.layout == "packed":
        shapes = free_shapes(int(lengths[0]), manifest.token_budget)
    else:
        return place_similar(lengths, manifest.token_budget)
    if manifest.layout == "packed":
        packer = _Packer(_candidates(lengths, manifest.batch_tokens), is_free=not manifest.shapes)
        return _best_placement(shapes, packer.pack, cost)
    return _best_placement(shapes, partial(place_one_a_row, lengths), cost)


def _candidates(lengths: Int, batch_tokens: int) -> Int:
    """The oldest waiting windows: LOOK_AHEAD of them, or two batches, whichever is more."""
    two_batches = int(np.searchsorted(lengths.cumsum(), 2 * batch_tokens)) + 1
    return lengths[: max(LOOK_AHEAD, two_batches)]


def _best_placement(
    shapes: Sequence[Shape], choose: Callable[[Shape], Placement], cost: Callable[[Shape], float]
) -> Placement:
    """The placement with the most tokens for its cost, padding not counted; of equal ones, the smallest.

    Shapes are tried in descending order of tokens per cost of a full batch. The search ends when the best placement so
    far is better than the next shape could be if it were full.
    """
    worth = {shape: shape[0] * shape[1] / cost(shape) for shape in shapes}
    best: Placement | None = None
    best_score = (0.0, 0)
    for shape in sorted(shapes, key=lambda shape: -worth[shape]):
        if best is not None and best_score[0] > worth[shape]:
            break
        placement = choose(shape)
        used = (placement.rows, placement.length)
        score = (placement.tokens / cost(used), -used[0] * used[1])
        if best is None or score > best_score:
            best, best_score = placement, score
    assert best is not None, "the pipeline cuts windows to the longest shape"
    return best


def free_shapes(oldest: int, budget: int) -> list[Shape]:
    """Candidate shapes where the model takes any: rows as long as the oldest window, or of a longer ROUND_LENGTHS.

    Short rows cost less attention; long rows can be filled better.

    Args:
        oldest: Length in tokens of the oldest window.
        budget: Most tokens of a batch, padding included.
    """
    lengths = {oldest, *(length for length in ROUND_LENGTHS if oldest <= length <= budget)}
    return [(max(1, budget // length), length) for length in sorted(lengths)]


def place_similar(lengths: Int, budget: int) -> Placement:
    """A batch of windows of similar length, one a row, of at most ``budget`` padded tokens, or of one window.

    Windows are sorted by length, longest first. A candidate is a range of them: it begins at any window and ends where
    the budget is reached, or where windows are 5 % shorter than its first. Of the candidates that contain the oldest
    window, the one with the most tokens for its cost is taken.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    oldest = int(np.flatnonzero(order == 0)[0])
    begin = np.arange(oldest + 1)
    end = np.minimum(begin + np.maximum(1, budget // descending[begin]), len(order))
    similar_end = np.minimum(end, np.searchsorted(-descending, -0.95 * descending[begin], side="right"))
    begin, end = np.tile(begin, 2), np.concatenate([end, similar_end])
    begin, end = begin[end > oldest], end[end > oldest]
    tokens = np.concatenate([np.zeros(1, np.int64), np.cumsum(descending)])
    longest = descending[begin]
    costs = np.maximum((end - begin) * longest, CPU_MIN_TOKENS) * (1 + longest * ATTENTION_SHARE)
    best = int(((tokens[end] - tokens[begin]) / costs).argmax())
    window = order[begin[best] : end[best]]
    return in_own_rows(lengths, window, (len(window), int(longest[best])))


def place_equal(lengths: Int, budget: int) -> Placement:
    """The oldest window, and as many of its length, oldest first, as ``budget`` tokens take."""
    length = int(lengths[0])
    window = np.flatnonzero(lengths == length)[: max(1, budget // length)]
    return in_own_rows(lengths, window, (len(window), length))


def place_one_a_row(lengths: Int, shape: Shape) -> Placement:
    """A batch of a fixed shape with one window a row: the oldest window, then the longest that fit."""
    rows, length = shape
    others = np.flatnonzero(lengths[1:] <= length) + 1
    longest = others[np.argsort(-lengths[others], kind="stable")]
    window = np.concatenate([np.zeros(1, np.int64), longest])[:rows]
    return in_own_rows(lengths, window, shape)


def in_own_rows(lengths: Int, window: Int, shape: Shape) -> Placement:
    """A batch of a shape whose first rows hold the chosen windows, one each.

    Args:
        lengths: Length in tokens of every waiting window; int64, shape (windows,).
        window: The chosen ones, as indices into ``lengths``; int64, shape (n,).
        shape: Of the batch.
    """
    row = np.arange(len(window))
    return Placement(*shape, int(lengths[window].sum()), window, row, np.zeros_like(row))


def pack(lengths: Int, shape: Shape) -> Placement:
    """Packs windows into the rows of a fixed shape; each row repeatedly takes the longest window that still fits."""
    return _Packer(lengths).pack(shape)


class _Packer:
    """Waiting windows grouped by length, so that the time to try a shape does not depend on how many windows wait.

    Args:
        lengths: Length in tokens of every waiting window, oldest first; int64, shape (n,), n > 0.
        is_free: Whether a batch may have fewer and shorter rows than the shape that is tried.
    """

    def __init__(self, lengths: Int, *, is_free: bool = False) -> None:
        small = lengths.astype(np.min_scalar_type(int(lengths.max())))  # NumPy sorts 16-bit integers by radix
        counts = np.bincount(lengths)
        distinct = np.flatnonzero(counts)
        end = counts.cumsum()[distinct]
        self._is_free = is_free
        self._oldest = int(lengths[0])
        self._by_length = small.argsort(kind="stable")  # oldest first within a length
        self._distinct = distinct.tolist()
        self._end = dict(zip(self._distinct, end.tolist(), strict=True))
        self._first = dict(zip(self._distinct, (end - counts[distinct]).tolist(), strict=True))

    def pack(self, shape: Shape) -> Placement:
        """Fills the rows of a shape; the first row begins with the oldest window."""
        rows, length = shape
        distinct, following = self._distinct.copy(), self._first.copy()
        window: list[int] = []  # positions in ``_by_length``
        row: list[int] = []
        column: list[int] = []
        widest = tokens = 0
        for number in range(rows):
            free = length
            while distinct and distinct[0] <= free:
                size = distinct[bisect_right(distinct, free) - 1] if window else self._oldest
                position = following[size]
                window.append(position)
                row.append(number)
                column.append(length - free)
                free -= size
                following[size] = position + 1
                if position + 1 == self._end[size]:
                    distinct.remove(size)
            tokens += length - free
            widest = max(widest, length - free)
        if self._is_free:
            rows, length = row[-1] + 1, widest
        return Placement(rows, length, tokens, self._by_length[window], np.array(row), np.array(column))


def spread(starts: Int, counts: Int) -> Int:
    """Concatenated ranges: ``starts[i], starts[i] + 1, …``, ``counts[i]`` numbers each.

    Args:
        starts, counts: int64, shape (n,).

    Returns:
        int64, shape (sum of counts,).
    """
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    shifts: Int = np.repeat(starts - (ends - counts), counts)
    return shifts + np.arange(total)
