"""Decoding agrees with seqeval's conlleval mode, and with a plain computation of every strategy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from nermill.worker.tagging import decode
from tests.doubles.engine import LABELS

MODEL = decode.ModelLabels(LABELS)
TAGS = st.lists(st.sampled_from(LABELS), max_size=30)


def logits_of(tags: list[str]) -> np.ndarray:
    logits = np.zeros((len(tags), len(LABELS)), np.float32)
    logits[np.arange(len(tags)), [LABELS.index(tag) for tag in tags]] = 5
    return logits


@given(st.lists(TAGS, min_size=1, max_size=4))
def test_spans_are_seqevals(documents: list[list[str]]) -> None:
    flat = [tag for tags in documents for tag in tags]
    document = np.repeat(np.arange(len(documents)), [len(tags) for tags in documents])
    words = np.concatenate([np.arange(len(tags)) for tags in documents])
    units = decode.units(logits_of(flat), document, words, MODEL, "first")
    spans = decode.spans(units)
    starts = np.cumsum([0, *map(len, documents)])
    expected = [
        (d, MODEL.names.index(kind) + 1, first + starts[d], last + starts[d])
        for d, tags in enumerate(documents)
        for kind, first, last in get_entities(tags)
    ]
    found = zip(spans.document, spans.type, spans.first, spans.last, strict=True)
    assert [tuple(map(int, s)) for s in found] == [tuple(map(int, e)) for e in expected]


@given(TAGS)
def test_tags_are_valid_iob2_and_say_what_the_spans_say(tags: list[str]) -> None:
    units = decode.units(logits_of(tags), np.zeros(len(tags), np.int64), np.arange(len(tags)), MODEL, "first")
    written = [MODEL.tags[n] for n in decode.tag_numbers(units, decode.spans(units))]
    assert get_entities(written) == get_entities(tags)
    for before, tag in zip(["O", *written], written, strict=False):
        assert tag[:1] != "I" or before[1:] == tag[1:], "an I- follows its own kind"


@pytest.mark.parametrize("aggregation", ["first", "average", "max"])
@given(data=st.data())
def test_words_are_aggregated_as_the_strategy_says(aggregation: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=10))
    count = sum(sizes)
    logits = np.random.default_rng(data.draw(st.integers(0, 999))).normal(size=(count, len(LABELS))).astype(np.float32)
    words = np.repeat(np.arange(len(sizes)), sizes)
    units = decode.units(logits, np.zeros(count, np.int64), words, MODEL, aggregation)  # type: ignore[arg-type]
    probabilities = decode.softmax(logits)
    for word in range(len(sizes)):
        mine = probabilities[words == word]
        row = {"first": mine[0], "average": mine.mean(0), "max": mine[mine.max(-1).argmax()]}[aggregation]
        assert units.type[word] == MODEL.type[row.argmax()]
        assert units.score[word] == pytest.approx(row.max(), abs=1e-6)


def test_none_leaves_every_token_alone_and_simple_groups_them() -> None:
    logits = logits_of(["B-PER", "I-PER", "I-PER"])
    units = decode.units(logits, np.zeros(3, np.int64), np.array([0, 0, 1]), MODEL, "none")
    assert len(decode.spans(units, join=False).first) == 3
    assert len(decode.spans(units).first) == 1


def test_a_span_scores_the_mean_of_its_words() -> None:
    logits = logits_of(["B-PER", "I-PER"])
    logits[1] /= 2
    units = decode.units(logits, np.zeros(2, np.int64), np.arange(2), MODEL, "first")
    assert decode.spans(units).score[0] == pytest.approx(units.score.mean())


def test_labels_without_prefix_are_types_of_their_own() -> None:
    labels = decode.ModelLabels(("O", "PER", "LOC"))
    assert labels.names == ("LOC", "PER")
    assert labels.type.tolist() == [0, 2, 1]
