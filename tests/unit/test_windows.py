"""Windows cover every token and overlap as requested; a token's prediction is that with the most context."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nermill.worker.tagging.windows import SPECIAL_TOKENS, split_into_windows

COUNTS = st.lists(st.integers(0, 200), min_size=1, max_size=8)


def bounds_of(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@given(COUNTS, st.integers(8, 70), st.integers(0, 40))
def test_every_token_is_kept_from_exactly_one_window(counts: list[int], max_length: int, overlap: int) -> None:
    windows = split_into_windows(bounds_of(counts), max_length, overlap)
    kept = np.zeros(sum(counts), np.int64)
    for start, end in zip(windows.keep_start, windows.keep_end, strict=True):
        kept[start:end] += 1
    assert (kept == 1).all()
    assert (windows.start <= windows.keep_start).all()
    assert (windows.keep_end <= windows.end).all()
    assert (windows.lengths <= max_length).all()


@given(COUNTS, st.integers(8, 70), st.integers(0, 40))
def test_windows_stay_in_their_document_and_overlap_as_asked(counts: list[int], max_length: int, overlap: int) -> None:
    bounds = bounds_of(counts)
    windows = split_into_windows(bounds, max_length, overlap)
    assert (windows.start >= bounds[windows.document]).all()
    assert (windows.end <= bounds[windows.document + 1]).all()
    for document in range(len(counts)):
        mine = windows.of(windows.document == document)
        shared = mine.end[:-1] - mine.start[1:]
        assert (shared >= min(overlap, (max_length - SPECIAL_TOKENS) // 2)).all()
        assert len(set(mine.lengths.tolist())) <= 1
        assert not len(shared) or np.ptp(shared) <= 1


@given(st.integers(1, 400), st.integers(8, 70), st.integers(0, 40))
def test_a_document_has_no_window_more_than_it_needs(count: int, max_length: int, overlap: int) -> None:
    windows = split_into_windows(bounds_of([count]), max_length, overlap)
    capacity = max_length - SPECIAL_TOKENS
    shared, fewer = min(overlap, capacity // 2), len(windows) - 1
    assert windows.end[-1] == count
    assert fewer * capacity - max(0, fewer - 1) * shared < count


@given(st.integers(1, 400), st.integers(8, 70), st.integers(0, 40))
def test_a_shared_token_comes_from_the_window_with_more_context(count: int, max_length: int, overlap: int) -> None:
    windows = split_into_windows(bounds_of([count]), max_length, overlap)
    for token in range(count):
        owner = int(np.flatnonzero((windows.keep_start <= token) & (token < windows.keep_end))[0])

        def context(window: int, token: int = token) -> int:
            left = token - windows.start[window] if windows.start[window] else max_length
            right = windows.end[window] - 1 - token if windows.end[window] < count else max_length
            return int(min(left, right))

        seen_by = np.flatnonzero((windows.start <= token) & (token < windows.end))
        assert context(owner) >= max(context(int(w)) for w in seen_by) - 1


def test_a_document_that_fits_is_one_window() -> None:
    windows = split_into_windows(bounds_of([30, 0, 62]), 64, 16)
    assert windows.document.tolist() == [0, 2]
    assert windows.lengths.tolist() == [32, 64]
