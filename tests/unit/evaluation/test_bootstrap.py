"""Bootstrap intervals equal those of a plain resampling of documents, and are as wide as theory predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nermill.worker.evaluation import evaluate
from nermill.worker.evaluation.scores import Histogram, f1_of, interval
from tests.unit.evaluation.runs import Doc, make_run


def test_the_histogram_resamples_as_documents_do() -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 4, 800)
    predicted = rng.integers(0, 4, 800)
    correct = rng.integers(0, np.minimum(true, predicted) + 1)
    histogram = Histogram()
    histogram.add(true[:500], predicted[:500], correct[:500])
    histogram.add(true[500:], predicted[500:], correct[500:])
    ours = interval(f1_of(*histogram.resample(3).T))
    picks = rng.integers(0, 800, (4000, 800))
    theirs = interval(f1_of(*(column[picks].sum(1) for column in (true, predicted, correct))))
    assert ours == pytest.approx(theirs, abs=0.006)


def test_documents_without_entities_take_part() -> None:
    histogram = Histogram()
    histogram.add(*(np.array([n]) for n in (1, 1, 1)))
    sums = histogram.resample(3, without=1)
    assert set(sums[:, 0].tolist()) == {0, 1, 2}


def test_an_interval_holds_its_score_and_narrows_with_documents(tmp_path: Path) -> None:
    widths = []
    for count in (50, 800):
        docs = [Doc(["a", "b"], ["B-X", "O" if n % 3 else "B-X"], ["B-X", "O"]) for n in range(count)]
        report = evaluate(make_run(tmp_path / str(count), docs))
        low, high = report["f1_interval"]
        assert low < report["f1"] < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


def test_a_report_is_the_same_twice(tmp_path: Path) -> None:
    docs = [Doc(["a", "b"], ["B-X", "B-Y" if n % 4 else "O"], ["B-X", "O"]) for n in range(90)]
    run = make_run(tmp_path, docs, per_shard=20)
    assert evaluate(run) == evaluate(run)
