"""Comparison of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nermill.worker.contracts.errors import UsageError
from nermill.worker.evaluation import evaluate
from tests.unit.evaluation.runs import Doc, make_run, stats_of, write_part

WORDS = ["Anna", "flew", "to", "Rome"]
GOLD = ["B-PER", "O", "O", "B-LOC"]
HALF = ["B-PER", "O", "O", "O"]


def test_the_difference_of_two_runs(tmp_path: Path) -> None:
    """Of 90 documents the first run gets half of 30 wrong, the other half of 10; their parts differ in size."""
    one = make_run(tmp_path / "one", [Doc(WORDS, HALF if n < 30 else GOLD, GOLD) for n in range(90)], per_shard=20)
    two = make_run(tmp_path / "two", [Doc(WORDS, HALF if n < 10 else GOLD, GOLD) for n in range(90)], per_shard=35)
    report = evaluate(one, compare=two)
    found = report["compare"]
    assert (found["documents"], found["documents_with_other_tags"]) == (90, 20)
    assert found["first_with_other_tags"] == [f"doc:{n}" for n in range(10, 30)]
    assert found["f1"]["this"] == pytest.approx(report["f1"])
    assert found["f1"]["other"] == pytest.approx(evaluate(two)["f1"])
    assert found["f1"]["difference"] == pytest.approx(found["f1"]["other"] - found["f1"]["this"])
    low, high = found["f1"]["difference_interval"]
    assert 0 < low < found["f1"]["difference"] < high
    assert found["throughput"]["ratio"] == pytest.approx((90 / 3) / (90 / 5))


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    docs = [Doc(WORDS, GOLD, GOLD, [0.5, 0.6]), Doc(WORDS, None, GOLD)]
    others = [Doc(WORDS, GOLD, GOLD, [0.9, 0.1]), Doc(WORDS, None, GOLD)]
    found = evaluate(make_run(tmp_path / "a", docs), compare=make_run(tmp_path / "b", others))["compare"]
    assert found["documents_with_other_tags"] == 0
    assert found["f1"]["difference_interval"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Doc(WORDS, GOLD, None), Doc(WORDS, HALF, None)),
        (Doc(WORDS, HALF, None), Doc(WORDS, ["B-LOC", "O", "O", "O"], None)),
        (Doc(WORDS, GOLD, None), Doc(WORDS, None, None)),
        (Doc(WORDS, ["O", "I-PER", "O", "O"], None), Doc(WORDS, ["O", "B-PER", "O", "O"], None)),
    ],
)
def test_every_kind_of_difference_counts_once(tmp_path: Path, mine: Doc, theirs: Doc) -> None:
    same = Doc(WORDS, GOLD, None)
    one, two = make_run(tmp_path / "a", [same, mine, same]), make_run(tmp_path / "b", [same, theirs, same])
    found = evaluate(one, compare=two)["compare"]
    assert (found["documents_with_other_tags"], found["first_with_other_tags"]) == (1, ["doc:1"])
    assert "f1" not in found


def test_a_gold_file_serves_both(tmp_path: Path) -> None:
    gold = tmp_path / "gold.conll"
    gold.write_text("Anna B-PER\nflew O\nto O\nRome B-LOC\n\n" * 2, "utf-8")
    one = make_run(tmp_path / "a", [Doc(WORDS, HALF, None)] * 2)
    two = make_run(tmp_path / "b", [Doc(WORDS, GOLD, None)] * 2, per_shard=1)
    f1 = evaluate(one, gold=gold, compare=two)["compare"]["f1"]
    assert (f1["this"], f1["other"]) == (pytest.approx(2 / 3), 1.0)


def test_throughput_ratio(tmp_path: Path) -> None:
    docs = [Doc(WORDS, GOLD, GOLD)] * 10
    one, two = make_run(tmp_path / "a", docs), make_run(tmp_path / "b", docs)
    write_part(two, 0, 0, docs, stats_of(0, 10, finished=1000.25))
    assert evaluate(one, compare=two)["compare"]["throughput"] == {"this": 10.0, "other": 40.0, "ratio": 4.0}


def test_runs_over_other_documents(tmp_path: Path) -> None:
    docs = [Doc(WORDS, GOLD, GOLD)] * 4
    one, fewer = make_run(tmp_path / "a", docs), make_run(tmp_path / "b", docs[:3])
    with pytest.raises(UsageError, match="more documents than the run it is compared with"):
        evaluate(one, compare=fewer)
    other = make_run(tmp_path / "c", [*docs[:3], Doc(WORDS, GOLD, GOLD, id="elsewhere")])
    with pytest.raises(UsageError, match=r"'elsewhere' where .* has 'doc:3'; only runs over the same input"):
        evaluate(one, compare=other)
