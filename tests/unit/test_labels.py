"""``--map``, ``--only`` and ``--min-score``: what is written, what is counted, which labels are refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.labels import LabelChoice, bare_labels, nested, suggest_map
from nermill.worker.contracts.plan import Options, options_from
from nermill.worker.tagging.decode import ModelLabels, Spans, choose

MODEL = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def test_gold_tags_are_renamed_left_out_and_counted():
    changes: Counter[str] = Counter()
    choice = LabelChoice({"person": "PER", "thing": "O"}, only=("PER", "LOC"))
    tags = ["B-person", "I-person", "O", "B-thing", "B-LOC", "B-MISC", "B-creative-work"]
    assert choice.tags(tags, changes) == ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "O"]
    assert nested(changes)["gold"] == {
        "mapped": {"person": 1},
        "left_out": {"thing": 1, "MISC": 1, "creative-work": 1},
    }


def test_spans_are_renamed_left_out_and_counted():
    labels = ModelLabels(MODEL)
    at = np.arange(4)
    spans = Spans(at * 0, at, at, np.array([1, 2, 2, 1]), np.array([0.9, 0.9, 0.4, 0.9], np.float32))
    chosen, renamed, changes = choose(spans, labels, LabelChoice({"PER": "person"}, ("person",), 0.5))
    assert chosen.first.tolist() == [1]
    assert renamed.names[int(chosen.type[0]) - 1] == "person"
    assert renamed.tags == ("O", "B-", "I-", "B-person", "I-person")
    assert labels.names == ("LOC", "PER")
    assert changes == {"predicted.left_out.LOC": 2, "predicted.mapped.PER": 1, "predicted.below_min_score.PER": 1}
    assert choose(spans, labels, LabelChoice()) == (spans, labels, Counter())


def test_what_the_model_does_not_have_is_named():
    known = bare_labels((*MODEL, "S-MISC"))
    assert known == ["LOC", "MISC", "PER"]
    LabelChoice({"person": "PER", "LOC": "place", "x": "O"}, ("PER", "place")).check(known, "demo")
    with pytest.raises(UsageError, match="--only GPE: the model demo has no label GPE; it has LOC, MISC, PER"):
        LabelChoice(only=("GPE",)).check(known, "demo")
    with pytest.raises(UsageError, match="--map person=PRE: the model demo has neither person nor PRE"):
        LabelChoice({"person": "PRE"}).check(known, "demo")


def test_a_map_is_suggested_by_usual_names():
    assert suggest_map(["person", "corporation", "xyz", "loc"], ["PER", "ORG", "LOC"]) == (
        "--map person=PER,corporation=ORG,loc=LOC"
    )
    assert suggest_map(["xyz"], ["PER"]) == "--map xyz=PER"


@pytest.mark.parametrize(
    "body",
    [{"only": ["PER", 3]}, {"only": [""]}, {"map": {"a": ""}}, {"map": {"a": 1}}, {"min_score": 1.5}, {"map": []}],
)
def test_options_from_untrusted_json_are_checked(body):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        options_from(body)
    wanted = {"map": {"a": "b"}, "only": ["b"], "min_score": 0.5}
    assert options_from(wanted) == Options(map={"a": "b"}, only=("b",), min_score=0.5)
