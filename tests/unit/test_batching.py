"""Batches: the oldest window is always included, windows do not overlap, rows are full where enough windows wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.worker.tagging.batching import Placement, cost, pack, place, spread
from tests.doubles.engine import manifest

LENGTHS = st.lists(st.integers(3, 64), min_size=1, max_size=120).map(lambda values: np.array(values, np.int64))
SHAPES = st.sampled_from([((1, 64),), ((4, 64),), ((2, 128),), ((1, 64), (4, 128)), ((16, 64), (1, 512))])


def padding(placement: Placement, lengths: np.ndarray) -> float:
    return 1 - float(lengths[placement.window].sum()) / (placement.rows * placement.length)


def assert_sound(placement: Placement, lengths: np.ndarray) -> None:
    assert 0 in placement.window, "the oldest window waits no longer"
    assert len(set(placement.window.tolist())) == len(placement.window)
    cells = np.zeros((placement.rows, placement.length), np.int64)
    for window, row, column in zip(placement.window, placement.row, placement.column, strict=True):
        assert column + lengths[window] <= placement.length
        cells[row, column : column + lengths[window]] += 1
    assert cells.max() == 1


@given(LENGTHS, SHAPES, st.sampled_from(["packed", "plain"]))
def test_fixed_shapes(lengths: np.ndarray, shapes: tuple[tuple[int, int], ...], layout: str) -> None:
    placement = place(lengths, manifest(shapes, layout=layout))
    assert (placement.rows, placement.length) in shapes
    assert_sound(placement, lengths)
    if layout == "plain":
        assert (placement.column == 0).all()


@pytest.mark.parametrize("layout", ["packed", "plain"])
@given(lengths=LENGTHS, budget=st.integers(1, 600))
def test_free_shapes_keep_to_the_budget(layout: str, lengths: np.ndarray, budget: int) -> None:
    placement = place(lengths, manifest(token_budget=budget, layout=layout))
    assert_sound(placement, lengths)
    assert len(placement.window) == 1 or placement.rows * placement.length <= budget


@given(LENGTHS, st.integers(1, 600))
def test_rows_of_equal_length_have_no_padding(lengths: np.ndarray, budget: int) -> None:
    placement = place(lengths, manifest(token_budget=budget, layout="equal"))
    assert_sound(placement, lengths)
    assert padding(placement, lengths) == 0
    assert len(placement.window) == min((lengths == lengths[0]).sum(), max(1, budget // int(lengths[0])))
    assert (np.diff(placement.window) > 0).all()


@given(LENGTHS, SHAPES)
def test_a_whole_pool_is_served(lengths: np.ndarray, shapes: tuple[tuple[int, int], ...]) -> None:
    waiting, served = lengths, 0
    while len(waiting):
        taken = place(waiting, manifest(shapes)).window
        waiting = np.delete(waiting, taken)
        served += len(taken)
    assert served == len(lengths)


@pytest.mark.parametrize(
    "batch",
    [partial(pack, shape=shape) for shape in [(8, 64), (8, 128), (16, 128)]]
    + [partial(place, manifest=manifest(token_budget=1024))],
)
def test_rows_are_full_while_the_pool_is(batch: Callable[[np.ndarray], Placement]) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(2.2, 8.0, 4000).astype(np.int64) + 3, 3, 64)  # like sentences: mean 20
    shares = []
    while lengths.sum() > 8192:
        placement = batch(lengths)
        shares.append(padding(placement, lengths))
        lengths = np.delete(lengths, placement.window)
    assert np.mean(shares) <= 0.01


def test_the_cheapest_shape_per_token_is_chosen() -> None:
    shapes = ((1, 64), (8, 64))
    assert place(np.full(100, 32), manifest(shapes)).rows == 8
    few = place(np.full(3, 64), manifest(((2, 64), (64, 64))))
    assert few.rows == 2, "three windows do not pay for 64 rows"


def test_windows_one_a_row_go_to_the_nearest_of_several_lengths() -> None:
    """One window a row, measured costs of BERT-large on a 310P3, lengths of documents: padding is near the minimum."""
    seconds = {(32, 64): 0.0416, (16, 128): 0.0439, (8, 256): 0.0490, (4, 512): 0.0565}
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(4.2, 0.9, 6000).astype(np.int64), 3, 512)
    nearest = [next(shape for shape in seconds if shape[1] >= length) for length in lengths.tolist()]
    perfect = sum(seconds[shape] / shape[0] for shape in nearest)
    padded = len(lengths) * seconds[(4, 512)] / 4
    waiting, rest, spent = lengths[:512], lengths[512:], 0.0
    while len(waiting):
        placement = place(waiting, manifest(tuple(seconds), layout="plain", max_length=512), seconds.__getitem__)
        taken = len(placement.window)
        spent += seconds[(placement.rows, placement.length)]
        waiting = np.concatenate([np.delete(waiting, placement.window), rest[:taken]])
        rest = rest[taken:]
    assert perfect <= spent <= 1.06 * perfect
    assert spent < padded / 3


def test_long_rows_cost_more_than_their_tokens() -> None:
    assert cost((1, 512)) > cost((8, 64))
    assert cost((1, 64)) == cost((2, 64)), "an accelerator waits for its memory below some 350 tokens"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20))
def test_spread_is_concatenated_ranges(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in pairs], np.int64)
    counts = np.array([count for _, count in pairs], np.int64)
    expected = [position for start, count in pairs for position in range(start, start + count)]
    assert spread(starts, counts).tolist() == expected
