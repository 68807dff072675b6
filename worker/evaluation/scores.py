"""Counts chunks and computes precision, recall, F1 and accuracy from them, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nermill.worker.evaluation.blocks import Block
from nermill.worker.evaluation.chunks import NO_LABEL, Chunks, Ints, LabelIndex, O, find_correct

Floats = NDArray[np.float64]

REPLICATES = 1000
SEED = 20030531
LENGTH_EDGES = np.array([1, 6, 11, 21, 41, 81, 161, 321, 641])  # bins of documents by their words
F1_BINS = 10
_DRAWN_AT_ONCE = 4_000_000  # random numbers drawn at once; limits memory where all documents have different counts


def precision_recall_f1(true: float, predicted: float, correct: float) -> dict[str, float]:
    """Precision, recall and F1 as seqeval computes them with ``zero_division=0``.

    Args:
        true, predicted, correct: Number of chunks in gold, in the prediction, and in both.
    """
    precision = correct / predicted if predicted else 0.0
    recall = correct / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


@dataclass
class Histogram:
    """Number of documents by their tuple of counts, for a bootstrap over documents.

    Few tuples are distinct: a million sentences have some hundred. Resampling documents with replacement is the same as
    one multinomial draw over the distinct tuples, so the bootstrap is exact and fast.
    """

    documents: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, *counts: Ints) -> None:
        """Adds the documents of a block.

        Args:
            counts: One array for each count of the tuple; int64, shape (documents,).
        """
        tuples, times = np.unique(np.stack(counts, axis=1), axis=0, return_counts=True)
        self.documents.update(dict(zip(map(tuple, tuples.tolist()), times.tolist(), strict=True)))

    def resample(self, width: int, without: int = 0) -> Ints:
        """Sums of the counts over REPLICATES resamples of the documents.

        Args:
            width: Length of the tuples.
            without: Number of further documents whose counts are all 0.

        Returns:
            int64, shape (REPLICATES, width).
        """
        tuples = {**self.documents, (0,) * width: self.documents[(0,) * width] + without}
        counts = np.array(list(tuples), np.int64)
        times = np.array(list(tuples.values()), np.int64)
        documents = max(1, int(times.sum()))
        rng = np.random.default_rng(SEED)
        step = max(1, _DRAWN_AT_ONCE // len(times))
        draws = (
            rng.multinomial(documents, times / documents, size=min(step, REPLICATES - at)) @ counts
            for at in range(0, REPLICATES, step)
        )
        sums: Ints = np.concatenate(list(draws))
        return sums


def f1_of(true: Ints, predicted: Ints, correct: Ints) -> Floats:
    """F1 of arrays of counts, elementwise; 0 where there is neither a true nor a predicted chunk."""
    total = np.maximum(true + predicted, 1)
    f1: Floats = 2 * correct / total
    return f1


def interval(values: Floats) -> list[float]:
    """The 2.5th and the 97.5th percentile of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


@dataclass
class ChunkCounts:
    """Counts true, predicted and correct chunks, block by block.

    Attributes:
        labels: Numbers of the labels.
        conlleval, strict: True, predicted and correct chunks of each label, in both modes; int64, shape (labels, 3),
            which grows with the labels.
        documents, words: Scored documents and their words.
        perfect: Documents without a mistake.
        right_words: Words with the right tag.
        outside_words: Words outside of gold entities.
    """

    labels: LabelIndex
    conlleval: Ints = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    strict: Ints = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    documents: int = 0
    perfect: int = 0
    words: int = 0
    right_words: int = 0
    outside_words: int = 0
    _micro: Histogram = field(default_factory=Histogram)
    _strict: Histogram = field(default_factory=Histogram)
    _per_label: dict[int, Histogram] = field(default_factory=dict)
    _lengths: Ints = field(default_factory=lambda: np.zeros((len(LENGTH_EDGES), 4), np.int64))
    _f1_bins: Ints = field(default_factory=lambda: np.zeros(F1_BINS, np.int64))

    def add(self, block: Block, gold: Chunks, predicted: Chunks) -> None:
        """Takes in a block's scored documents."""
        correct = find_correct(gold, predicted)
        hits = predicted.keep(correct)
        documents, kinds = len(block.scored), len(self.labels)
        self.conlleval = _grown(self.conlleval, kinds) + _by_label(kinds, gold, predicted, hits)
        strict = predicted.keep(predicted.strict), predicted.keep(predicted.strict & correct)
        self.strict = _grown(self.strict, kinds) + _by_label(kinds, gold, *strict)
        per_document = [np.bincount(c.document, minlength=documents) for c in (gold, predicted, hits)]
        self._micro.add(*per_document)
        self._strict.add(per_document[0], *(np.bincount(c.document, minlength=documents) for c in strict))
        for label in range(kinds):
            counts = [np.bincount(c.document[c.label == label], minlength=documents) for c in (gold, predicted, hits)]
            some = (counts[0] + counts[1]) > 0
            self._per_label.setdefault(label, Histogram()).add(*(column[some] for column in counts))
        self._add_words(block)
        self._add_lengths(np.diff(block.gold.offsets), per_document)

    def _add_words(self, block: Block) -> None:
        gold, predicted = block.gold, block.predicted
        right = (gold.prefix == predicted.prefix) & (gold.label == predicted.label)
        self.documents += len(block.scored)
        self.words += len(right)
        self.right_words += int(right.sum())
        self.outside_words += int((gold.label == NO_LABEL).sum())
        wrong_before = np.concatenate([[O], np.cumsum(~right)])[gold.offsets]
        self.perfect += int((np.diff(wrong_before) == 0).sum())

    def _add_lengths(self, words: Ints, counts: list[Ints]) -> None:
        bucket = np.maximum(np.searchsorted(LENGTH_EDGES, words, side="right") - 1, 0)
        for column, values in enumerate([np.ones_like(words), *counts]):
            self._lengths[:, column] += np.bincount(bucket, values, len(LENGTH_EDGES)).astype(np.int64)
        some = (counts[0] + counts[1]) > 0
        f1 = f1_of(*(column[some] for column in counts))
        self._f1_bins += np.bincount(np.minimum((f1 * F1_BINS).astype(np.int64), F1_BINS - 1), minlength=F1_BINS)

    def scores(self) -> dict[str, Any]:
        """All scores, with the report's names; those without another name are micro averages in conlleval mode."""
        per_label = self._label_scores()
        strict = {name: precision_recall_f1(*map(int, row)) for name, row in self._named(self.strict)}
        return {
            **precision_recall_f1(*self.conlleval.sum(0).tolist()),
            "accuracy": self.right_words / self.words if self.words else 0.0,
            "accuracy_all_outside": self.outside_words / self.words if self.words else 0.0,
            "f1_interval": self._interval(self._micro),
            "support": int(self.conlleval[:, 0].sum()),
            "predicted": int(self.conlleval[:, 1].sum()),
            "correct": int(self.conlleval[:, 2].sum()),
            "macro": _mean(list(per_label.values())),
            "strict": {
                **precision_recall_f1(*self.strict.sum(0).tolist()),
                "f1_interval": self._interval(self._strict),
                "macro": _mean(list(strict.values())),
                "per_label": strict,
            },
            "per_label": per_label,
            "words": self.words,
            "scored_documents": self.documents,
            "perfect_documents": self.perfect,
            "by_length": self._by_length(),
            "by_document": {
                "f1_histogram": self._f1_bins.tolist(),
                "f1_edges": np.linspace(0, 1, F1_BINS + 1).round(6).tolist(),
                "without_entities": self.documents - int(self._f1_bins.sum()),
            },
        }

    def _named(self, counts: Ints) -> list[tuple[str, list[int]]]:
        """Labels that occur, sorted by name, with their counts, as in seqeval's report."""
        return sorted((name, row) for name, row in zip(self.labels.names, counts.tolist(), strict=False) if sum(row))

    def _label_scores(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                **precision_recall_f1(*row),
                "support": row[0],
                "predicted": row[1],
                "f1_interval": self._interval(self._per_label[self.labels.label(name)]),
            }
            for name, row in self._named(self.conlleval)
        }

    def _interval(self, histogram: Histogram) -> list[float]:
        without = self.documents - histogram.documents.total()
        return interval(f1_of(*histogram.resample(3, without).T))

    def _by_length(self) -> list[dict[str, Any]]:
        upper = [*(LENGTH_EDGES[1:] - 1).tolist(), None]
        return [
            {"words_from": int(low), "words_to": high, "documents": row[0], "support": row[1]}
            | precision_recall_f1(*row[1:])
            for low, high, row in zip(LENGTH_EDGES, upper, self._lengths.tolist(), strict=True)
            if row[0]
        ]


def _grown(counts: Ints, labels: int) -> Ints:
    return np.pad(counts, ((0, labels - len(counts)), (0, 0)))


def _by_label(labels: int, *chunks: Chunks) -> Ints:
    return np.stack([np.bincount(c.label, minlength=labels) for c in chunks], axis=1)


def _mean(scores: list[dict[str, Any]]) -> dict[str, float]:
    """Unweighted mean over labels."""
    names = ("f1", "precision", "recall")
    return {name: float(np.mean([s[name] for s in scores])) if scores else 0.0 for name in names}
