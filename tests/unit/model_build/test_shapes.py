"""Which shapes to compile: the best choice by a table of costs, and the three ways to fill their rows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.model_build.shapes import batches, best_shapes, compare
from nermill.worker.contracts.costs import Costs
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import Layout
from tests.doubles.engine import manifest

lengths_of_a_corpus = st.lists(st.integers(3, 40), min_size=1, max_size=25)
tables = st.dictionaries(
    st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24, 40])), st.floats(0.1, 10), min_size=1, max_size=7
)
layouts = st.sampled_from(["packed", "plain"])


def seconds_of(lengths: np.ndarray, costs: Costs, shapes: tuple[tuple[int, int], ...], layout: Layout) -> float:
    """Cost of each window in the cheapest shape that it fits, where all batches are full."""
    total = 0.0
    for length in lengths.tolist():
        prices = [
            length * costs.token_seconds(shape) if layout == "packed" else costs.row_seconds(shape)
            for shape in shapes
            if shape[1] >= length
        ]
        total += min(prices, default=float("inf"))
    return total


@given(lengths_of_a_corpus, tables, st.integers(1, 4), layouts)
def test_choice_is_as_good_as_brute_force(
    lengths: list[int], table: dict[tuple[int, int], float], count: int, layout: Layout
) -> None:
    costs = Costs("table", "measured", "", {**table, (1, 40): 5.0})
    corpus = np.array(lengths)
    best = min(
        seconds_of(corpus, costs, shapes, layout)
        for number in range(1, count + 1)
        for shapes in combinations(costs.seconds, min(number, len(costs.seconds)))
    )
    chosen = best_shapes(corpus, costs, count, layout)
    assert len(chosen) <= count
    assert seconds_of(corpus, costs, chosen, layout) == pytest.approx(best)


def test_no_shape_for_the_longest_window() -> None:
    costs = Costs("mine", "measured", "", {(2, 16): 1.0})
    with pytest.raises(UsageError, match="--costs mine: no shape takes a window of 17 tokens"):
        best_shapes(np.array([3, 17]), costs, 1)


@given(lengths_of_a_corpus, st.integers(1, 50), layouts)
def test_batches_compute_every_window_once(lengths: list[int], waiting: int, layout: Layout) -> None:
    costs = Costs("table", "measured", "", {(2, 16): 1.0, (1, 40): 2.0})
    made = batches(np.array(lengths), costs, manifest(tuple(costs.seconds), layout=layout), waiting)
    computed = made.calls[(2, 16)] * 32 + made.calls[(1, 40)] * 40
    assert made.fill * computed == pytest.approx(sum(lengths))
    assert made.seconds == made.calls[(2, 16)] + 2 * made.calls[(1, 40)]
    assert made.rows == 2 * made.calls[(2, 16)] + made.calls[(1, 40)]
    assert layout == "packed" or made.rows >= len(lengths)


@pytest.mark.parametrize(
    ("lengths", "padded", "bucketed", "packed"),
    [
        ([16] * 64 + [40] * 32, 6 * 12.0, 2.0 + 3.0, 2.0 + 3.0),  # full without packing
        ([8] * 128, 8 * 12.0, 2 * 2.0, 2.0),  # two a row
    ],
)
def test_the_three_ways_by_one_table(lengths: list[int], padded: float, bucketed: float, packed: float) -> None:
    costs = Costs("table", "estimate", "", {(64, 16): 2.0, (32, 40): 3.0, (1, 64): 9.0, (16, 64): 12.0})
    ways = compare(np.array(lengths), costs, manifest(max_length=64), 2)
    assert {way: (made.layout, made.seconds) for way, made in ways.items()} == {
        "padded": ("plain", padded), "bucketed": ("plain", bucketed), "packed": ("packed", packed),
    }  # fmt: skip
    assert ways["padded"].shapes == ((16, 64),)
    assert ways["padded"].fill == pytest.approx(sum(lengths) / (padded / 12 * 16 * 64))
    with pytest.raises(UsageError, match="no shape takes a window of 65 tokens"):
        compare(np.array([65]), costs, manifest(), 1)
