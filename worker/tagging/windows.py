"""Turns documents into tokens and tokens into windows, as arrays, with the word and the characters of each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = 2  # a window is [CLS] content [SEP]

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Windows:
    """Ranges of tokens that each fit the model, and the tokens whose logits are taken from each.

    Neighbouring windows of a long document overlap. The logits of a token that is in two windows are taken from the
    window in which the shorter of the token's two contexts, left and right, is longer. This divides each overlap in its
    middle.

    Attributes:
        document: Document of each window, int64, shape (windows,), as all five attributes.
        start, end: Range of the window's tokens in ``Tokens.ids``, half-open.
        keep_start, keep_end: Range of the tokens whose logits are taken from the window, half-open.
    """

    document: Int
    start: Int
    end: Int
    keep_start: Int
    keep_end: Int

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> Int:
        """Length of each window in tokens, special tokens included, int64, shape (windows,)."""
        return self.end - self.start + SPECIAL_TOKENS

    @property
    def columns(self) -> tuple[Int, ...]:
        """The five attributes."""
        return self.document, self.start, self.end, self.keep_start, self.keep_end

    def of(self, chosen: Int | NDArray[np.bool_]) -> Windows:
        """A selection of the windows.

        Args:
            chosen: Indices, int64, or a mask, bool, shape (windows,).
        """
        return Windows(*(column[chosen] for column in self.columns))


def concatenate(*parts: Windows) -> Windows:
    """All windows in one object; the ranges are not changed."""
    return Windows(*map(np.concatenate, zip(*(part.columns for part in parts), strict=True)))


def split_into_windows(bounds: Int, max_length: int, overlap: int) -> Windows:
    """Splits documents into windows of at most ``max_length`` tokens, special tokens included.

    A document that fits is one window. A longer one is covered by as few windows as can be, all of one length. Its
    neighbours share at least ``overlap`` tokens, all pairs the same number or one more. A document without tokens has
    no window.

    Args:
        bounds: First token of each document, and the number of tokens, int64, shape (documents + 1,).
        max_length: Longest window in tokens, special tokens included.
        overlap: Tokens that neighbours share; more than half a window's content is reduced to half.
    """
    capacity = max_length - SPECIAL_TOKENS
    shared = min(overlap, capacity // 2)
    counts = np.diff(bounds)
    windows = np.where(counts > capacity, -(-(counts - shared) // (capacity - shared)), np.minimum(counts, 1))
    size = -(-(counts + (windows - 1) * shared) // np.maximum(windows, 1))
    document = np.repeat(np.arange(len(counts)), windows)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
    start = bounds[:-1][document] + nth * (counts - size)[document] // np.maximum(windows - 1, 1)[document]
    end = start + size[document]
    keep_start, keep_end = start.copy(), end.copy()
    joined = np.flatnonzero(document[1:] == document[:-1])
    middle = (start[joined + 1] + end[joined]) // 2
    keep_end[joined] = middle
    keep_start[joined + 1] = middle
    return Windows(document, start, end, keep_start, keep_end)
