"""The main scores are computed by seqeval, and nermill's counts must equal them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nermill.producer import cli
from nermill.worker.contracts.errors import EvaluationError
from nermill.worker.contracts.layout import REPORT_HTML, REPORT_JSON
from nermill.worker.contracts.tags import to_iob2
from nermill.worker.evaluation import chunks, evaluate, headline, scores
from nermill.worker.evaluation.report import render_report
from tests.unit.evaluation.runs import Doc, make_run, read_conll

TAGS = ["O", "O", "B-PER", "I-PER", "B--X", "I--X", "B-A-", "I-A-", "B-7", "I-7"]  # seqeval strips dashes, we do not
DOCS = [Doc(["a", "b", "c"], ["B-PER", "I-PER", "O"], ["B-PER", "O" if n % 3 else "I-PER", "O"]) for n in range(9)]


def without_source(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in ("headline", "run")}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.integers(0, 9).flatmap(lambda n: st.tuples(*[st.lists(st.sampled_from(TAGS), min_size=n, max_size=n)] * 2)),
        min_size=1,
        max_size=40,
    )
)
@pytest.mark.slow
def test_counts_and_seqeval_agree_on_random_tags(tmp_path_factory: pytest.TempPathFactory, pairs: Any) -> None:
    docs = [Doc([f"w{n}" for n in range(len(gold))], tags, to_iob2(gold, "IOB1")) for gold, tags in pairs]
    run = make_run(tmp_path_factory.mktemp("random"), docs, per_shard=7)
    report = evaluate(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headline, "SENTENCES", 0)
        counted = evaluate(run)
    assert counted["headline"]["by"] == "nermill"
    if any(gold for gold, _ in pairs):
        assert report["headline"]["by"] == "seqeval"
        assert report["headline"]["largest_difference"] <= 1e-9
    assert near(without_source(report), without_source(counted))


def near(one: Any, other: Any) -> bool:
    """Whether two reports are equal, numbers to 1e-9."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, float):
        return bool(abs(one - other) <= 1e-9)
    return bool(one == other)


def test_the_sample_is_scored_by_seqeval(sample: Path, tmp_path: Path) -> None:
    source = sample / "wikigold.conll"
    sentences = read_conll(source)
    rng = np.random.default_rng(3)
    tags = sorted({tag for _, gold in sentences for tag in gold})
    docs = [
        Doc(words, [str(rng.choice(tags)) if rng.random() < 0.1 else tag for tag in gold], gold)
        for words, gold in sentences
    ]
    report = evaluate(make_run(tmp_path, docs))
    assert report["headline"].pop("largest_difference") <= 1e-9
    assert report["headline"] == {"by": "seqeval", "version": version("seqeval")}
    assert 0 < report["f1"] < 1
    assert f"by seqeval {version('seqeval')}." in render_report(report)


def test_beyond_the_limit_seqeval_scores_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, DOCS, per_shard=4)
    for name, most in (("SENTENCES", 8), ("WORDS", 26)):
        with monkeypatch.context() as patch:
            patch.setattr(headline, name, most)
            assert evaluate(run)["headline"]["by"] == "nermill"
            assert "--seqeval" in evaluate(run)["headline"]["reason"]
            assert evaluate(run, seqeval=True)["headline"]["by"] == "seqeval"
    assert evaluate(run)["headline"]["by"] == "seqeval"


def forget_a_correct_chunk(*chunks: Any) -> Any:
    correct = find_correct(*chunks)
    correct[np.flatnonzero(correct)[:1]] = False
    return correct


find_correct = chunks.find_correct


def test_a_count_that_differs_from_seqevals_fails_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, DOCS)
    monkeypatch.setattr(scores, "find_correct", forget_a_correct_chunk)
    with pytest.raises(EvaluationError, match=r"^seqeval's \w+ is 0\.\d+, nermill's counts give 0\.\d+: .*report it"):
        evaluate(run)
    monkeypatch.setattr(sys, "argv", ["nermill", "evaluate", run.uri, "--seqeval"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "seqeval's" in told.err
    assert not run.exists(REPORT_JSON)
    assert not run.exists(REPORT_HTML)


@pytest.mark.parametrize("figure", ["accuracy", "per_label PER f1", "strict recall"])
def test_every_headline_figure_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str) -> None:
    def changed(self: scores.ChunkCounts) -> dict[str, Any]:
        found = made(self)
        *path, name = figure.split()
        inner = found
        for step in path:
            inner = inner[step]
        inner[name] += 1e-8
        return found

    made = scores.ChunkCounts.scores
    monkeypatch.setattr(scores.ChunkCounts, "scores", changed)
    with pytest.raises(EvaluationError, match=figure):
        evaluate(make_run(tmp_path, DOCS))
