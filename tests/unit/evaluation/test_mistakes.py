"""Kinds of mistakes, confusion, lengths and calibration, counted by hand on few words."""

from __future__ import annotations

from pathlib import Path

import pytest

from nermill.worker.evaluation import evaluate
from tests.unit.evaluation.runs import Doc, make_run

WORDS = [f"w{n}" for n in range(8)]


def report_of(tmp_path: Path, *docs: Doc) -> dict:
    return evaluate(make_run(tmp_path, docs, per_shard=2))


@pytest.mark.parametrize(
    ("gold", "predicted", "kind"),
    [
        ("B-PER I-PER O O O O O O", "B-PER I-PER O O O O O O", "correct"),
        ("B-PER I-PER O O O O O O", "B-PER O O O O O O O", "boundary"),
        ("B-PER I-PER O O O O O O", "B-LOC I-LOC O O O O O O", "label"),
        ("B-PER I-PER O O O O O O", "O B-LOC I-LOC O O O O O", "label_and_boundary"),
        ("B-PER I-PER O O O O O O", "O O O O O O O O", "missed"),
        # cut in two, one half with the right label: a boundary mistake
        ("B-PER I-PER O O O O O O", "B-LOC B-PER O O O O O O", "boundary"),
    ],
)
def test_every_gold_entity_has_one_kind(tmp_path: Path, gold: str, predicted: str, kind: str) -> None:
    kinds = report_of(tmp_path, Doc(WORDS, predicted.split(), gold.split()))["mistakes"]
    assert {name: n for name, n in kinds.items() if n} == {kind: 1}


def test_an_invented_entity_shares_no_word_with_gold(tmp_path: Path) -> None:
    report = report_of(
        tmp_path,
        Doc(WORDS, ["B-PER", "O", "O", "B-LOC", *"OOOO"], ["B-PER", *"OOOOOOO"]),
    )
    assert report["mistakes"]["invented"] == 1
    assert report["confusion"] == {
        "gold": ["LOC", "PER", "none"],
        "predicted": ["LOC", "PER", "none"],
        "entities": [[0, 0, 0], [0, 1, 0], [1, 0, 0]],
    }


def test_confusion_takes_the_entity_with_most_words(tmp_path: Path) -> None:
    gold = ["B-ORG", "I-ORG", "I-ORG", "I-ORG", "O", "O", "B-PER", "O"]
    predicted = ["B-PER", "B-LOC", "I-LOC", "I-LOC", "O", "O", "O", "O"]
    confusion = report_of(tmp_path, Doc(WORDS, predicted, gold))["confusion"]
    cells = {
        (gold_label, label): count
        for gold_label, row in zip(confusion["gold"], confusion["entities"], strict=True)
        for label, count in zip(confusion["predicted"], row, strict=True)
        if count
    }
    assert cells == {("ORG", "LOC"): 1, ("PER", "none"): 1}


def test_a_rejected_document_counts_as_all_outside(tmp_path: Path) -> None:
    gold = ["B-PER", "O", "O", "O", "O", "O", "O", "O"]
    report = report_of(tmp_path, Doc(WORDS, gold, gold), Doc(WORDS, None, gold))
    assert (report["precision"], report["recall"]) == (1.0, 0.5)
    assert report["accuracy"] == 15 / 16
    assert report["accuracy_all_outside"] == 14 / 16
    (worst,) = report["worst"]
    assert worst["rejected"]
    assert (worst["doc_index"], worst["missed"], worst["false"]) == (1, 1, 0)


def test_documents_without_gold_are_not_scored(tmp_path: Path) -> None:
    gold = ["B-PER", "O", "O", "O", "O", "O", "O", "O"]
    report = report_of(tmp_path, Doc(WORDS, gold, None), Doc(WORDS, gold, gold), Doc(None, None, None))
    assert (report["documents"], report["scored_documents"], report["f1"]) == (3, 1, 1.0)


def test_worst_documents_come_first_with_their_words(tmp_path: Path) -> None:
    gold = ["B-PER", "O", "B-LOC", "O", "O", "O", "O", "O"]
    docs = [
        Doc(WORDS, gold, gold),
        Doc(WORDS, ["O"] * 8, gold),
        Doc(WORDS, ["B-LOC", *"OOOOO", "B-PER", "O"], gold),
    ]
    worst = report_of(tmp_path, *docs)["worst"]
    assert [(w["doc_index"], w["missed"], w["false"]) for w in worst] == [(2, 2, 2), (1, 2, 0)]
    (excerpt,) = worst[0]["excerpts"]
    assert excerpt["words"] == WORDS
    assert excerpt["gold"][1] == {"first": 2, "end": 3, "label": "LOC", "correct": False}
    assert [span["label"] for span in excerpt["predicted"]] == ["LOC", "PER"]


def test_fifty_worst_of_many_are_kept(tmp_path: Path) -> None:
    docs = [Doc(WORDS, ["B-PER"] * (n % 8) + ["O"] * (8 - n % 8), ["O"] * 8) for n in range(400)]
    worst = report_of(tmp_path, *docs)["worst"]
    assert [w["false"] for w in worst] == [7] * 50
    assert [w["doc_index"] for w in worst] == [8 * n + 7 for n in range(50)]


def test_a_long_document_shows_its_mistakes_not_all_of_itself(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(5000)]
    tags = ["O"] * 5000
    tags[2000] = tags[4000] = "B-PER"
    (worst,) = report_of(tmp_path, Doc(words, tags, ["O"] * 5000))["worst"]
    assert [excerpt["at_word"] for excerpt in worst["excerpts"]] == [1985, 3985]
    assert "w2000" in worst["excerpts"][0]["words"]
    assert sum(len(excerpt["words"]) for excerpt in worst["excerpts"]) < 100


def test_calibration_by_hand(tmp_path: Path) -> None:
    """Four entities at 0.95, three of them right; two at 0.55, one right; words of two code points and of emoji."""
    words = ["é😀", "is", "Łódź", "ok"]
    gold = ["B-PER", "O", "B-LOC", "I-LOC"]
    docs = [
        Doc(words, gold, gold, [0.95, 0.95]),
        Doc(words, gold, gold, [0.95, 0.55]),
        Doc(words, ["B-LOC", "O", "B-ORG", "I-ORG"], gold, [0.55, 0.95]),
    ]
    calibration = report_of(tmp_path, *docs)["calibration"]
    assert calibration["entities"] == 6
    assert [(b["entities"], b["precision"]) for b in calibration["bins"]] == [(2, 0.5), (4, 0.75)]
    assert [b["mean_score"] for b in calibration["bins"]] == pytest.approx([0.55, 0.95])
    assert calibration["expected_calibration_error"] == pytest.approx((2 * 0.05 + 4 * 0.20) / 6)


def test_scores_by_length_and_document(tmp_path: Path) -> None:
    short, long = ["a", "b"], [f"w{n}" for n in range(12)]
    docs = [
        Doc(short, ["B-PER", "O"], ["B-PER", "O"]),
        Doc(long, ["O"] * 12, ["B-PER"] + ["O"] * 11),
        Doc(long, ["O"] * 12, ["O"] * 12),
    ]
    report = report_of(tmp_path, *docs)
    rows = [(r["words_from"], r["words_to"], r["documents"], r["f1"]) for r in report["by_length"]]
    assert rows == [(1, 5, 1, 1.0), (11, 20, 2, 0.0)]
    assert report["by_document"]["without_entities"] == 1
    assert report["by_document"]["f1_histogram"] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert report["perfect_documents"] == 2
    assert sum(row["documents"] for row in report["lengths"]["histogram"]) == 3


def test_labels_with_dashes_stay_apart(tmp_path: Path) -> None:
    tags = ["B-A-B", "O", "B-A", "I-A", "O", "O", "O", "O"]
    report = report_of(tmp_path, Doc(WORDS, tags, tags))
    assert sorted(report["per_label"]) == ["A", "A-B"]
