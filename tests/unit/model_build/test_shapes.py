"""Which shapes to compile: parsing --shapes, the bundled cost tables, the best choice, packing."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.model_build.shapes import Costs, best_shapes, bucket, load_costs, packing
from nermill.worker.contracts.errors import UsageError

lengths_of_a_corpus = st.lists(st.integers(3, 40), min_size=1, max_size=25)
tables = st.dictionaries(
    st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24, 40])), st.floats(0.1, 10), min_size=1, max_size=7
)


def seconds_of(lengths: np.ndarray, costs: Costs, shapes: tuple[tuple[int, int], ...]) -> float:
    """Cost of each window in the cheapest shape that it fits, where all rows are full."""
    total = 0.0
    for length in lengths.tolist():
        prices = [costs.token_seconds(shape) for shape in shapes if shape[1] >= length]
        total += length * min(prices, default=float("inf"))
    return total


@given(lengths_of_a_corpus, tables, st.integers(1, 4))
def test_choice_is_as_good_as_brute_force(lengths: list[int], table: dict[tuple[int, int], float], count: int) -> None:
    costs = Costs("table", "measured", "", {**table, (1, 40): 5.0})
    corpus = np.array(lengths)
    best = min(
        seconds_of(corpus, costs, shapes)
        for number in range(1, count + 1)
        for shapes in combinations(costs.seconds, min(number, len(costs.seconds)))
    )
    chosen = best_shapes(corpus, costs, count)
    assert len(chosen) <= count
    assert seconds_of(corpus, costs, chosen) == pytest.approx(best)


def test_no_shape_for_the_longest_window() -> None:
    costs = Costs("mine", "measured", "", {(2, 16): 1.0})
    with pytest.raises(UsageError, match="--costs mine: no shape takes a window of 17 tokens"):
        best_shapes(np.array([3, 17]), costs, 1)


@given(lengths_of_a_corpus, st.integers(1, 50))
def test_packing_computes_every_window_once(lengths: list[int], waiting: int) -> None:
    costs = Costs("table", "measured", "", {(2, 16): 1.0, (1, 40): 2.0})
    packed = packing(np.array(lengths), costs, tuple(costs.seconds), waiting)
    computed = packed.calls[(2, 16)] * 32 + packed.calls[(1, 40)] * 40
    assert packed.fill * computed == pytest.approx(sum(lengths))
    assert packed.seconds == packed.calls[(2, 16)] + 2 * packed.calls[(1, 40)]
    assert packed.rows == 2 * packed.calls[(2, 16)] + packed.calls[(1, 40)]


def test_buckets_are_the_nearest_lengths_at_their_best_number_of_rows() -> None:
    costs = Costs("table", "estimate", "", {(1, 16): 1.0, (4, 16): 2.0, (2, 40): 3.0, (1, 64): 9.0})
    bucketed = bucket(np.array([3, 16, 17, 40]), costs)
    assert (bucketed.lengths, bucketed.seconds) == ([16, 40], 2 * 2.0 / 4 + 2 * 3.0 / 2)
    assert bucketed.fill == pytest.approx(76 / (16 + 16 + 40 + 40))
    with pytest.raises(UsageError, match="no shape takes a window of 65 tokens"):
        bucket(np.array([65]), costs)


@pytest.mark.parametrize(("name", "peak"), [("310p3-bert-large", 768.5), ("310p3-bert-base", 2884)])
def test_shipped_tables_are_the_published_ones(name: str, peak: float) -> None:
    costs = load_costs(name)
    assert costs.kind == "estimate"
    assert "ModelZoo" in costs.source
    assert 32 / costs.seconds[(32, 64)] == pytest.approx(peak, rel=1e-3)
    assert {length for _, length in costs.seconds} >= {64, 128, 256, 384, 512}


@pytest.mark.parametrize(
    "body", ["[]", "{", '{"kind": "measured", "source": "", "shapes": []}', '{"shapes": [{"rows": 1}]}']
)
def test_table_that_is_none(tmp_path: Path, body: str) -> None:
    (tmp_path / "costs.json").write_text(body, "utf-8")
    with pytest.raises(UsageError, match=r"costs\.json: n"):
        load_costs(str(tmp_path / "costs.json"))


def test_refused_shapes_of_a_bench_are_left_out(tmp_path: Path) -> None:
    shapes = [{"rows": 1, "length": 64, "seconds": 0.5}, {"rows": 64, "length": 64, "refused": "out of memory"}]
    body = {"kind": "measured", "source": "here", "shapes": shapes}
    (tmp_path / "costs.json").write_text(json.dumps(body), "utf-8")
    assert load_costs(str(tmp_path / "costs.json")).seconds == {(1, 64): 0.5}
