"""An evaluation that maps labels and leaves entities out, and its report about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.plan import Options, read_plan
from nermill.worker.evaluation import GoldOptions, evaluate
from tests.unit.evaluation.runs import Doc, make_run, stats_of, write_part

WORDS = ["Anna", "flew", "to", "Rome"]
TAGS = ["B-PER", "O", "O", "B-LOC"]
GOLD = ["B-person", "O", "O", "B-location"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path, [Doc(WORDS, TAGS, GOLD, scores=[0.9, 0.3]), Doc(WORDS, TAGS, TAGS, scores=[0.6, 0.8])])


def test_labels_are_mapped_on_both_sides(run: RunFolder) -> None:
    report = evaluate(run, choice=LabelChoice({"person": "PER", "location": "LOC"}))
    assert (report["f1"], report["support"], sorted(report["per_label"])) == (1.0, 4, ["LOC", "PER"])
    assert report["labels"]["gold"]["mapped"] == {"location": 1, "person": 1}
    assert report["labels"]["evaluation"]["map"] == {"person": "PER", "location": "LOC"}
    assert report["calibration"]["bins"][-1]["precision"] == 1.0


def test_labels_that_are_left_out_do_not_count(run: RunFolder) -> None:
    report = evaluate(run, choice=LabelChoice({"person": "PER"}, only=("PER",)))
    assert (report["f1"], report["support"], report["predicted"]) == (1.0, 2, 2)
    assert report["calibration"]["entities"] == 2
    assert report["labels"]["gold"]["left_out"] == {"LOC": 1, "location": 1}
    assert report["labels"]["predicted"]["left_out"] == {"LOC": 2}
    assert "left out by options: gold LOC (1), gold location (1), predicted LOC (2)" in report["warnings"]


def test_entities_below_the_score_do_not_count(run: RunFolder) -> None:
    report = evaluate(run, choice=LabelChoice({"person": "PER", "location": "LOC"}, min_score=0.5))
    assert (report["support"], report["predicted"], report["precision"], report["recall"]) == (4, 3, 1.0, 0.75)
    assert report["labels"]["predicted"]["below_min_score"] == {"LOC": 1}
    assert report["calibration"]["entities"] == 3


def test_scores_that_fit_no_tag_are_refused(tmp_path: Path) -> None:
    """As with ``--aggregation none``, where each token is an entity, and a word has one tag."""
    run = make_run(tmp_path, [Doc(["Anna", "Bob"], ["B-PER", "B-PER"], ["B-PER", "I-PER"])])
    path = run.path(part_name(0))
    part = pq.read_table(path)
    at = part.schema.get_field_index("tags")
    pq.write_table(part.set_column(at, part.schema.field(at), pa.array([["B-PER", "I-PER"]])), path)
    assert evaluate(run)["predicted"] == 1
    with pytest.raises(UsageError, match="'doc:0' has 2 entities for 1 tagged spans; --min-score needs"):
        evaluate(run, choice=LabelChoice(min_score=0.95))


def test_disjoint_labels_are_explained_with_the_map_that_mends_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(WORDS, TAGS, GOLD)] * 2)
    report = evaluate(run)
    (line,) = report["warnings"]
    assert report["f1"] == 0.0
    assert "location (2), person (2); it has LOC, PER; no label is in both, so F1 is 0" in line
    assert line.endswith(f"nermill evaluate {run.uri} --map location=LOC,person=PER")


def test_a_gold_file_is_mapped_as_the_run_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(WORDS, TAGS, TAGS)])
    replace(read_plan(run), options=Options(map={"person": "PER"}, only=("PER",))).write(run)
    write_part(
        run, 0, 0, [Doc(WORDS, ["B-PER", "O", "O", "O"], TAGS)], stats_of(0, 1, labels={"predicted.left_out.LOC": 1})
    )
    gold = tmp_path / "gold.conll"
    gold.write_text("".join(f"x\t{word}\t{tag}\n" for word, tag in zip(WORDS, GOLD, strict=True)))
    report = evaluate(run, gold=GoldOptions(gold, word_column=2, tag_column=-1))
    assert (report["f1"], report["support"]) == (1.0, 1)
    assert report["labels"]["gold"] == {"mapped": {"person": 1}, "left_out": {"location": 1}}
    assert report["labels"]["predicted"]["left_out"] == {"LOC": 1}
    with pytest.raises(UsageError, match="its lines have 3 columns, --word-column says 7"):
        evaluate(run, gold=GoldOptions(gold, word_column=7))
