"""The page of ``nermill-build accept``, from the figures of each layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nermill.model_build.accept import RECIPE, write_report
from nermill.model_build.advice import describe
from nermill.model_build.shapes import compare, compare_equal
from nermill.worker.contracts.costs import Costs
from tests.doubles.engine import manifest


def test_the_page_shows_compiled_shapes_and_rows_of_any_shape(tmp_path: Path) -> None:
    table = {(64, 16): 2.0, (16, 64): 12.0}
    lengths = np.array([8] * 128)
    ways = compare(lengths, Costs("table", "estimate", "", table), manifest(max_length=64), 2)
    equal = compare_equal(lengths, Costs("table", "estimate", "", table, "equal"))
    compared = describe({"bucketed": ways["bucketed"], "equal": equal["equal"]}, 128)
    step = {"name": "layouts", "state": "passed", "seconds": 0.0, "detail": "", "figures": {"compared": compared}}
    machine = {"processor": "a processor", "cores": 2, "system": "Linux", "python": "3.11"}
    about = {"passed": True, "device": "cpu", "checkpoint": "model", "machine": machine}
    write_report({**about, "recipe": {"source": "", **RECIPE}, "steps": [step]}, tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<tr><td>bucketed<td>64x16 <td>" in page
    assert "<tr><td>equal<td>any<td>100.0 %" in page
