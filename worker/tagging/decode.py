"""Turns logits into tags, and tags into entity spans with scores; vectorised over all documents of a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.labels import LabelChoice, bare_label, bare_labels, key
from nermill.worker.contracts.plan import Aggregation
from nermill.worker.contracts.tags import STARTING, split_tag
from nermill.worker.tagging.batching import spread

Int = NDArray[np.int64]
Float = NDArray[np.float32]


class ModelLabels:
    """A model's labels as arrays.

    Args:
        labels: Label of each logit: ``O``, ``B-PER``, ``I-PER`` … A label without a prefix is its own type.

    Attributes:
        names: Names of the types, sorted.
        type: Type of each label: 0 for ``O``, else 1 + index into ``names``; int64, shape (labels,).
        begins: Whether the label begins a span; bool, shape (labels,).
        tags: IOB2 tags by number: ``O``, then ``B-`` and ``I-`` of each name.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        names = bare_labels(labels)
        bare = [bare_label(label) for label in labels]
        self.names = tuple(names)
        self.type = np.array([names.index(name) + 1 if name else 0 for name in bare])
        self.begins = np.array([(split_tag(label) or "O")[0] in STARTING for label in labels])
        self.tags = _tags_of(names)

    def renamed(self, names: Sequence[str]) -> ModelLabels:
        """The same labels under other names.

        Args:
            names: New name of each type; several may be equal. An empty name is for a type that is not written.
        """
        labels = copy(self)
        labels.names, labels.tags = tuple(names), _tags_of(names)
        return labels


def _tags_of(names: Sequence[str]) -> tuple[str, ...]:
    return ("O", *(prefix + name for name in names for prefix in ("B-", "I-")))


@dataclass(frozen=True, slots=True)
class Units:
    """The units that get one tag each: words, or single tokens where the aggregation is ``none`` or ``simple``.

    Attributes:
        document: Document of each unit, int64, shape (units,).
        word: Word number within its document, int64, shape (units,).
        first, last: First and last token of each unit, int64, shape (units,).
        type: 0 for no entity, else 1 + index into ``ModelLabels.names``, int64, shape (units,).
        begins: Whether the predicted label begins a span, bool, shape (units,).
        score: Probability of the predicted label, float32, shape (units,).
    """

    document: Int
    word: Int
    first: Int
    last: Int
    type: Int
    begins: NDArray[np.bool_]
    score: Float


@dataclass(frozen=True, slots=True)
class Spans:
    """Entities of all documents, in order.

    Attributes:
        document: Document of each span, int64, shape (spans,).
        first, last: First and last unit of each span, inclusive, int64, shape (spans,).
        type: 1 + index into ``ModelLabels.names``, int64, shape (spans,).
        score: Mean of the scores of the span's units, float32, shape (spans,).
    """

    document: Int
    first: Int
    last: Int
    type: Int
    score: Float

    def where(self, kept: NDArray[np.bool_]) -> Spans:
        """Some of the spans; ``kept`` is bool, shape (spans,)."""
        return Spans(self.document[kept], self.first[kept], self.last[kept], self.type[kept], self.score[kept])


def softmax(logits: Float) -> Float:
    """Probabilities over the last axis, float32."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), np.float32)


def units(logits: Float, document: Int, words: Int, labels: ModelLabels, aggregation: Aggregation) -> Units:
    """Predicts one label for each unit.

    The strategies are those of transformers' ``TokenClassificationPipeline``: ``first`` takes a word's first token,
    ``average`` the mean of its tokens' probabilities, ``max`` the token with the highest probability; with ``none``
    and ``simple`` each token is a unit.

    Args:
        logits: float32, shape (tokens, labels).
        document: Document of each token, int64, shape (tokens,).
        words: Word of each token within its document, int64, shape (tokens,).
        labels: The model's labels.
        aggregation: The strategy.
    """
    count = len(document)
    if aggregation in ("none", "simple"):
        first = np.arange(count)
    else:
        new = np.ones(count, bool)
        new[1:] = (words[1:] != words[:-1]) | (document[1:] != document[:-1])
        first = np.flatnonzero(new)
    last = np.append(first[1:], count)[: len(first)] - 1
    if aggregation == "average" and count:
        sums = np.add.reduceat(softmax(logits), first, axis=0)
        chosen = np.asarray(sums / (last - first + 1)[:, None], np.float32)
    elif aggregation == "max" and count:
        probabilities = softmax(logits)
        confidence = probabilities.max(-1)
        unit = np.repeat(np.arange(len(first)), last - first + 1)
        by_unit_then_confidence = np.lexsort((-confidence, unit))
        chosen = probabilities[by_unit_then_confidence[first]]
    else:
        chosen = softmax(logits[first]) if count else logits
    label = chosen.argmax(-1) if count else np.zeros(0, np.int64)
    score = chosen[np.arange(len(label)), label] if count else np.zeros(0, np.float32)
    return Units(document[first], words[first], first, last, labels.type[label], labels.begins[label], score)


def spans(units: Units, *, join: bool = True) -> Spans:
    """Groups units into entities as conlleval does: a span ends before another type, another document or a ``B-``.

    Args:
        units: The predictions.
        join: False makes each unit with a label an entity (aggregation ``none``).
    """
    inside = np.flatnonzero(units.type)
    kind, where = units.type[inside], units.document[inside]
    opens = np.ones(len(inside), bool)
    if join:
        opens[1:] = (
            units.begins[inside[1:]]
            | (kind[1:] != kind[:-1])
            | (where[1:] != where[:-1])
            | (inside[1:] != inside[:-1] + 1)
        )
    begin = np.flatnonzero(opens)
    end = np.append(begin[1:], len(inside))[: len(begin)]
    if not len(begin):
        empty = np.zeros(0, np.int64)
        return Spans(empty, empty, empty, empty, np.zeros(0, np.float32))
    score = np.add.reduceat(units.score[inside], begin) / (end - begin)
    return Spans(where[begin], inside[begin], inside[end - 1], kind[begin], score.astype(np.float32))


def choose(spans: Spans, labels: ModelLabels, choice: LabelChoice) -> tuple[Spans, ModelLabels, Counter[str]]:
    """Applies ``--map``, ``--only`` and ``--min-score`` to entities.

    Returns:
        The spans that stay, the labels under their new names, and how many spans were mapped or left out by
        ``contracts.labels.key``.
    """
    if choice.is_all:
        return spans, labels, Counter()
    names = [choice.target(name) for name in labels.names]
    sure = spans.score >= np.float32(choice.min_score)
    named = np.array([True, *map(bool, names)])[spans.type]
    changes: Counter[str] = Counter()
    for number, (label, name) in enumerate(zip(labels.names, names, strict=True), 1):
        of_label = spans.type == number
        changes[key("predicted", label, name)] += int((of_label & (sure | (not name))).sum()) if name != label else 0
        changes[f"predicted.below_min_score.{label}"] += int((of_label & ~sure & named).sum())
    return spans.where(sure & named), labels.renamed(names), +changes


def tag_numbers(units: Units, spans: Spans) -> Int:
    """The IOB2 tag of each unit that corresponds to the spans, as an index into ``ModelLabels.tags``.

    Returns:
        int64, shape (units,).
    """
    tags = np.zeros(len(units.type), np.int64)
    length = spans.last - spans.first + 1
    inside = spread(spans.first, length)
    tags[inside] = np.repeat(2 * spans.type, length)
    tags[spans.first] = 2 * spans.type - 1
    return tags
