"""Tables of costs: the bundled ones, those of bench, and what they say of documents by length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.worker.contracts.costs import Costs, load_costs, seconds_of_full_batches, windows_of
from nermill.worker.contracts.errors import UsageError
from nermill.worker.tagging.windows import SPECIAL_TOKENS, split_into_windows


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


@pytest.mark.parametrize(
    ("layout", "is_free", "way"),
    [("packed", False, "packed"), ("packed", True, "packed"), ("plain", True, "packed"), ("plain", False, "bucketed")],
)
def test_a_table_says_how_its_graph_is_filled(tmp_path: Path, layout: str, is_free: bool, way: str) -> None:
    shapes = [{"rows": 1, "length": 64, "seconds": 0.5}]
    body = {"kind": "measured", "source": "here", "layout": layout, "is_free": is_free, "shapes": shapes}
    (tmp_path / "costs.json").write_text(json.dumps(body), "utf-8")
    assert load_costs(str(tmp_path / "costs.json")).way == way


def test_full_batches_of_short_and_long_documents() -> None:
    costs = Costs("table", "measured", "", {(4, 16): 4.0, (2, 32): 6.0})
    # 40 tokens in windows of 32 with 6 tokens shared are two windows of (38 + 6) / 2 and 2 special tokens
    seconds = seconds_of_full_batches({8: 10, 20: 1, 40: 1}, costs, 32, 6)
    assert seconds == pytest.approx(
        {"padded": 13 * 3.0, "bucketed": 10 * 1.0 + 3 * 3.0, "packed": 80 / 16 + (20 + 2 * 24) * 6 / 64}
    )


@given(st.integers(3, 300), st.integers(8, 64), st.integers(0, 64))
def test_windows_are_counted_as_they_are_split(length: int, window: int, overlap: int) -> None:
    bounds = np.array([0, length - SPECIAL_TOKENS])
    windows, tokens = windows_of(length, window, overlap)
    assert split_into_windows(bounds, window, overlap).lengths.tolist() == [tokens] * windows
