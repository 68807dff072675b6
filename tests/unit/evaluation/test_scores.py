"""nermill's scores equal seqeval's, in both modes."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval import metrics
from seqeval.scheme import IOB2

from nermill.worker.contracts.layout import REPORT_JSON, RunFolder
from nermill.worker.contracts.tags import detect_scheme, to_iob2
from nermill.worker.evaluation import evaluate, write_report
from tests.unit.evaluation.runs import DATA, Doc, make_run, read_conll

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-A-B", "I-A-B"]
CLOSE: Any = {"rel": 1e-9, "abs": 1e-9}


def garble(tags: list[str], rng: random.Random) -> list[str]:
    """A prediction: the gold tags with some changes, among them ``I-`` without a ``B-``."""
    return [rng.choice(TAGS) if rng.random() < 0.15 else tag for tag in tags]


def assert_equal_to_seqeval(gold: list[list[str]], predicted: list[list[str]], report: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns of labels that nothing predicts
        for mode, ours in (({}, report), ({"mode": "strict", "scheme": IOB2}, report["strict"])):
            for name in ("f1", "precision", "recall"):
                function = getattr(metrics, f"{name}_score")
                assert ours[name] == pytest.approx(function(gold, predicted, zero_division=0, **mode), **CLOSE)
                macro = function(gold, predicted, average="macro", zero_division=0, **mode)
                assert ours["macro"][name] == pytest.approx(0.0 if np.isnan(macro) else macro, **CLOSE)
            theirs = metrics.classification_report(gold, predicted, output_dict=True, zero_division=0, **mode)
            labels = {name for name in theirs if not name.endswith(" avg")}
            assert labels == {*ours["per_label"]}
            for label in labels:
                for ours_name, their_name in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
                    assert ours["per_label"][label][ours_name] == pytest.approx(theirs[label][their_name], **CLOSE)
        assert report["accuracy"] == pytest.approx(metrics.accuracy_score(gold, predicted), **CLOSE)


@pytest.mark.parametrize(
    ("gold", "predicted", "conlleval", "strict"),
    [  # true, predicted and correct phrases, as conlleval counts them and as strict IOB2 does
        ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1), (1, 1, 1)),
        ("B-PER I-PER O", "I-PER I-PER O", (1, 1, 1), (1, 0, 0)),  # conlleval forgives the missing B-
        ("B-PER I-PER O", "B-PER B-PER O", (1, 2, 0), (1, 2, 0)),
        ("B-PER I-PER O", "B-PER I-LOC O", (1, 2, 0), (1, 1, 0)),  # another label opens a phrase
        ("B-PER B-LOC O", "B-PER I-LOC O", (2, 2, 2), (2, 1, 1)),
        ("B-PER B-PER O", "B-PER I-PER O", (2, 1, 0), (2, 1, 0)),
        ("B-PER O B-PER", "B-PER O O", (2, 1, 1), (2, 1, 1)),
        ("O O O", "O I-PER I-PER", (0, 1, 0), (0, 0, 0)),
        ("O O O", "O O O", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_phrases_counted_by_hand(tmp_path: Path, gold: str, predicted: str, conlleval: tuple, strict: tuple) -> None:
    report = evaluate(make_run(tmp_path, [Doc(["a", "b", "c"], predicted.split(), gold.split())]))
    for ours, (true, found, correct) in ((report, conlleval), (report["strict"], strict)):
        assert ours["precision"] == (correct / found if found else 0)
        assert ours["recall"] == (correct / true if true else 0)
        assert ours["f1"] == pytest.approx(2 * correct / (true + found) if correct else 0, **CLOSE)
    assert (report["support"], report["predicted"], report["correct"]) == conlleval


@pytest.mark.parametrize("file", ["conll2003/valid.txt", "wikigold/wikigold.conll.txt"])
def test_a_real_corpus_scores_as_in_seqeval(file: str, tmp_path: Path) -> None:
    path = DATA / file
    if not path.exists():
        pytest.skip(f"{file} is not here")
    sentences = read_conll(path)
    scheme = detect_scheme(tags for _, tags in sentences)
    rng = random.Random(7)
    gold = [list(to_iob2(tags, scheme)) for _, tags in sentences]
    predicted = [garble(tags, rng) for tags in gold]
    docs = [Doc(words, p, g) for (words, _), p, g in zip(sentences, predicted, gold, strict=True)]
    report = evaluate(make_run(tmp_path, docs, per_shard=1000))
    assert_equal_to_seqeval(gold, predicted, report)
    assert report["documents"] == len(docs)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(st.sampled_from(TAGS), min_size=n, max_size=n)] * 2)),
        min_size=100,
        max_size=100,
    )
)
@pytest.mark.slow
def test_random_sequences_score_as_in_seqeval(tmp_path_factory: pytest.TempPathFactory, pairs) -> None:
    """Twenty examples of a hundred sequences: gold is converted to IOB2, predictions are not changed."""
    gold = [list(to_iob2(g, "IOB1")) for g, _ in pairs]
    predicted = [p for _, p in pairs]
    docs = [Doc([f"w{i}" for i in range(len(g))], p, g) for g, p in zip(gold, predicted, strict=True)]
    report = evaluate(make_run(tmp_path_factory.mktemp("random"), docs, per_shard=7))
    assert_equal_to_seqeval(gold, predicted, report)


def test_a_run_in_a_store_scores_as_on_a_disk(tmp_path: Path) -> None:
    docs = [Doc(["a", "b"], ["B-X", "O"], ["B-X", "O" if n % 3 else "B-X"]) for n in range(30)]
    local = make_run(tmp_path, docs, per_shard=10)
    remote = RunFolder("memory://evaluated/run=made")
    for name in local.list():
        remote.write(name, local.read(name))
    write_report(remote, evaluate(remote))
    report = json.loads(remote.read(REPORT_JSON))
    assert {**report, "run": ""} == {**evaluate(local), "run": ""}
