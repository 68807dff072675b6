"""Kinds of mistakes, confusion of labels, and the documents with the most mistakes."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nermill.worker.evaluation.blocks import Block
from nermill.worker.evaluation.chunks import Bools, Chunks, Ints, LabelIndex, find_correct

WORST = 50
_CONTEXT = 15  # words kept on both sides of a mistake
_EXCERPTS = 5  # most excerpts that are shown of a document
_EXCERPT_WORDS = 100
_WORD_CHARS = 60  # longer words are truncated

GOLD_KINDS = ("boundary", "label", "label_and_boundary", "missed")


@dataclass(frozen=True, slots=True)
class Overlaps:
    """All pairs of a gold and a predicted chunk that share a word, sorted by gold chunk.

    Attributes:
        gold, predicted: Indices of the chunks of each pair, int64, shape (pairs,).
        words: Number of words that they share, int64, shape (pairs,).
    """

    gold: Ints
    predicted: Ints
    words: Ints


def find_overlaps(gold: Chunks, predicted: Chunks) -> Overlaps:
    """Finds the pairs that share a word; both sides are sorted, and chunks of one side do not overlap."""
    low = np.searchsorted(predicted.end, gold.start, side="right")
    high = np.searchsorted(predicted.start, gold.end, side="left")
    count = np.maximum(high - low, 0)
    left = np.repeat(np.arange(len(gold)), count)
    right = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    shared = np.minimum(gold.end[left], predicted.end[right]) - np.maximum(gold.start[left], predicted.start[right])
    return Overlaps(left, right, shared)


@dataclass
class Mistakes:
    """Counts kinds of mistakes and confusions of labels, and keeps the WORST documents with most mistakes.

    A gold entity is one of: *correct*; *boundary* (found with its label and other words); *label* (found with its words
    and another label); *label and boundary* (found with other words and another label); *missed* (no predicted entity
    shares a word with it). A predicted entity that shares no word with a gold entity is *invented*.

    Args:
        labels: Numbers of the labels.
    """

    labels: LabelIndex
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("correct", *GOLD_KINDS, "invented"), 0))
    _confusion: dict[tuple[int, int], int] = field(default_factory=dict)  # gold and predicted label; -1 for no entity
    _worst: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    def add(self, block: Block, gold: Chunks, predicted: Chunks) -> None:
        """Adds a block's scored documents.

        Args:
            block: The block.
            gold, predicted: Its chunks.
        """
        overlaps = find_overlaps(gold, predicted)
        correct = find_correct(predicted, gold)
        same_words = _same_words(gold, predicted, overlaps)
        same_label = np.zeros(len(gold), np.bool_)
        same_label[overlaps.gold[gold.label[overlaps.gold] == predicted.label[overlaps.predicted]]] = True
        touched = np.zeros(len(gold), np.bool_)
        touched[overlaps.gold] = True
        invented = np.ones(len(predicted), np.bool_)
        invented[overlaps.predicted] = False
        wrong = touched & ~correct
        found = {
            "correct": correct,
            "boundary": wrong & same_label,
            "label": wrong & ~same_label & same_words,
            "label_and_boundary": wrong & ~same_label & ~same_words,
            "missed": ~touched,
            "invented": invented,
        }
        for kind, which in found.items():
            self.kinds[kind] += int(which.sum())
        self._confuse(gold, predicted, overlaps, invented)
        self._keep_worst(block, gold, predicted, correct)

    def _confuse(self, gold: Chunks, predicted: Chunks, overlaps: Overlaps, invented: Bools) -> None:
        """Each gold entity counts once, with the predicted entity that shares most words; of equal ones, the first."""
        order = np.lexsort((overlaps.predicted, -overlaps.words, overlaps.gold))
        chosen, at = np.unique(overlaps.gold[order], return_index=True)
        seen = np.full(len(gold), -1)
        seen[chosen] = predicted.label[overlaps.predicted[order][at]]
        true = np.concatenate([gold.label, np.full(int(invented.sum()), -1)])
        taken = np.concatenate([seen, predicted.label[invented]])
        pairs, times = np.unique(np.stack([true, taken]), axis=1, return_counts=True)
        for (t, p), n in zip(pairs.T.tolist(), times.tolist(), strict=True):
            self._confusion[t, p] = self._confusion.get((t, p), 0) + n

    def _keep_worst(self, block: Block, gold: Chunks, predicted: Chunks, found: Bools) -> None:
        right = find_correct(gold, predicted)
        documents = len(block.scored)
        lost = np.bincount(gold.document[~found], minlength=documents)
        false = np.bincount(predicted.document[~right], minlength=documents)
        mistakes = lost + false
        least = self._worst[0][0] if len(self._worst) == WORST else 0
        for document in np.flatnonzero(mistakes > least).tolist():
            index = int(block.rows["doc_index"][int(block.scored[document])].as_py())
            key = int(mistakes[document]), -index
            if len(self._worst) == WORST and key <= self._worst[0][:2]:
                continue
            shown = self._show(block, document, gold, predicted, found, right)
            entry = (*key, {"doc_index": index, "missed": int(lost[document]), "false": int(false[document]), **shown})
            (heapq.heappushpop if len(self._worst) == WORST else heapq.heappush)(self._worst, entry)

    def _show(
        self, block: Block, document: int, gold: Chunks, predicted: Chunks, found: Bools, right: Bools
    ) -> dict[str, Any]:
        """A document's mistakes, with the words around them."""
        begin, end = (int(at) for at in block.gold.offsets[document : document + 2])
        sides = []
        for chunks, good in ((gold, found), (predicted, right)):
            some = np.flatnonzero(chunks.document == document)
            spans = zip(
                (chunks.start[some] - begin).tolist(),
                (chunks.end[some] - begin).tolist(),
                [self.labels.names[label] for label in chunks.label[some]],
                good[some].tolist(),
                strict=True,
            )
            sides.append([{"first": s, "end": e, "label": label, "correct": ok} for s, e, label, ok in spans])
        wrong = sorted((span["first"], span["end"]) for side in sides for span in side if not span["correct"])
        words = [word if len(word) <= _WORD_CHARS else word[:_WORD_CHARS] + "…" for word in block.words(document)]
        return {
            "doc_id": block.rows["doc_id"][int(block.scored[document])].as_py(),
            "rejected": not words or block.rows["tags"][int(block.scored[document])].as_py() is None,
            "words": end - begin,
            "excerpts": [_excerpt(words, sides, extent) for extent in _extents(wrong, end - begin)[:_EXCERPTS]],
        }

    def summary(self) -> dict[str, Any]:
        """Kinds, confusion and worst documents, with the report's names."""
        order = sorted(range(len(self.labels)), key=lambda label: self.labels.names[label])
        order = [label for label in order if any(label in pair for pair in self._confusion)]
        names = [self.labels.names[label] for label in order]
        rows = [*order, -1]
        return {
            "mistakes": self.kinds,
            "confusion": {
                "gold": [*names, "none"],
                "predicted": [*names, "none"],
                "entities": [[self._confusion.get((true, taken), 0) for taken in rows] for true in rows],
            },
            "worst": [entry for *_, entry in sorted(self._worst, key=lambda e: (-e[0], -e[1]))],
        }


def _same_words(gold: Chunks, predicted: Chunks, overlaps: Overlaps) -> Bools:
    left, right = overlaps.gold, overlaps.predicted
    equal = (gold.start[left] == predicted.start[right]) & (gold.end[left] == predicted.end[right])
    same = np.zeros(len(gold), np.bool_)
    same[left[equal]] = True
    return same


def _extents(wrong: list[tuple[int, int]], words: int) -> list[tuple[int, int]]:
    """Ranges of words around mistakes; ranges that touch are joined, up to _EXCERPT_WORDS words."""
    extents: list[tuple[int, int]] = []
    for first, end in wrong:
        first, end = max(0, first - _CONTEXT), min(words, min(end, first + _CONTEXT) + _CONTEXT)
        if extents and first <= extents[-1][1] and end - extents[-1][0] <= _EXCERPT_WORDS:
            extents[-1] = extents[-1][0], max(end, extents[-1][1])
        else:
            extents.append((first, end))
    return extents


def _excerpt(words: list[str], sides: list[list[dict[str, Any]]], extent: tuple[int, int]) -> dict[str, Any]:
    first, end = extent
    gold, predicted = sides

    def within(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**span, "first": max(span["first"], first) - first, "end": min(span["end"], end) - first}
            for span in spans
            if span["first"] < end and span["end"] > first
        ]

    return {
        "at_word": first,
        "words": words[first:end],
        "gold": within(gold),
        "predicted": within(predicted),
        "continues": end < len(words),
    }
