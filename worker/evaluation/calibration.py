"""Calibration: whether the score of entities equals the share of them that are correct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nermill.worker.evaluation.blocks import Block
from nermill.worker.evaluation.chunks import Bools, Chunks, Ints, LabelIndex
from nermill.worker.evaluation.scores import Floats

BINS = 10


@dataclass
class Calibration:
    """Counts entities in ten equal bins of their score.

    An entity is correct where gold has an entity with the same code points and the same label.

    Args:
        labels: Assigns numbers to labels.
    """

    labels: LabelIndex
    _entities: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))
    _right: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))
    _scores: Floats = field(default_factory=lambda: np.zeros(BINS))

    def add(self, block: Block, gold: Chunks) -> None:
        """Adds the entities of a block's scored documents.

        Args:
            block: The block.
            gold: Its gold entities.
        """
        lists: Any = block.rows["entities"].take(block.scored)
        entities = lists.flatten()
        if not len(entities):
            return
        document = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
        score = entities.field("score").to_numpy().astype(np.float64)
        right = self._find_right(block, gold, entities, document)
        bins = np.clip((score * BINS).astype(np.int64), 0, BINS - 1)
        self._entities += np.bincount(bins, minlength=BINS)
        self._right += np.bincount(bins[right], minlength=BINS)
        self._scores += np.bincount(bins, score, BINS)

    def _find_right(self, block: Block, gold: Chunks, entities: pa.StructArray, document: Ints) -> Bools:
        if not len(gold):
            return np.zeros(len(entities), np.bool_)
        begin, end, base = _word_positions(block)
        gold_start, gold_end = begin[gold.start], end[gold.end - 1]
        start, stop = (base[document] + entities.field(name).to_numpy() for name in ("start", "end"))
        names = entities.field("label").dictionary_encode()
        numbers = np.array([self.labels.label(str(name)) for name in names.dictionary.to_pylist()], np.int64)
        at = np.minimum(np.searchsorted(gold_start, start), len(gold) - 1)
        right: Bools = (gold_start[at] == start) & (gold_end[at] == stop)
        right &= gold.label[at] == numbers[names.indices.to_numpy()]
        return right

    def summary(self) -> dict[str, Any]:
        """The reliability table and the expected calibration error, with the report's names.

        The error is the mean over entities of |mean score - precision| of their bin (Naeini et al., AAAI 2015).
        """
        total = int(self._entities.sum())
        filled = np.maximum(self._entities, 1)
        score, precision = self._scores / filled, self._right / filled
        gap = np.abs(score - precision) * self._entities
        rows = zip(self._entities.tolist(), score.tolist(), precision.tolist(), strict=True)
        return {
            "entities": total,
            "expected_calibration_error": float(gap.sum() / total) if total else 0.0,
            "bins": [
                {"from": n / BINS, "to": (n + 1) / BINS, "entities": count, "mean_score": s, "precision": p}
                for n, (count, s, p) in enumerate(rows)
                if count
            ],
        }


def _word_positions(block: Block) -> tuple[Ints, Ints, Ints]:
    """Positions of the words of a block's scored documents, in code points.

    Positions count from the begin of the block's first document, as if the documents were concatenated. The text of a
    document is its words joined by single spaces. A rejected document has no entities, so any positions will do there.

    Returns:
        First and past-the-last code point of each word, int64, shape (words,), and the first code point of each
        document, int64, shape (scored,).
    """
    offsets = block.gold.offsets
    lists: Any = block.rows["words"].take(block.scored)
    lengths = np.ones(int(offsets[-1]), np.int64)
    given = np.repeat(lists.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets))
    words: Any = pc.utf8_length(lists.flatten())
    lengths[given] = words.to_numpy(zero_copy_only=False)
    end = np.cumsum(lengths + 1)
    begin = end - lengths - 1
    base = np.append(begin, end[-1:])[offsets[:-1]] if len(begin) else np.zeros(len(offsets) - 1, np.int64)
    return begin, end - 1, base
