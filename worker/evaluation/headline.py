"""Scores computed by seqeval, the main scores of a report; nermill's streaming counts must equal them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from nermill.worker.contracts.errors import EvaluationError
from nermill.worker.evaluation.blocks import Block
from nermill.worker.evaluation.chunks import B, LabelIndex, O, Tags

SENTENCES = 20_000  # most documents that seqeval scores without --seqeval; the test set of CoNLL-2003 has 3,453
# The same in words, for long documents. seqeval took 4.3 s for 5,000 sentences of 20 words, in both modes together, on
# one core of an AMD EPYC: about 45 s for a million words.
WORDS = 400_000
TOLERANCE = 1e-9
_NAMES = {"f1": "f1-score", "precision": "precision", "recall": "recall"}


class Headline:
    """Collects tags for seqeval, and puts its scores into a report.

    Args:
        labels: Numbers of the labels.
        unlimited: Whether seqeval scores all documents, however many; it needs about 16 bytes for each word.
    """

    def __init__(self, labels: LabelIndex, *, unlimited: bool = False) -> None:
        self._labels = labels
        self._unlimited = unlimited
        self._is_over_limit = False
        self._words = 0
        self._gold: list[list[str]] = []
        self._predicted: list[list[str]] = []

    def add(self, block: Block) -> None:
        """Adds a block's scored documents; once there are more than the limit, all are dropped."""
        self._words += len(block.gold.prefix)
        documents = len(self._gold) + len(block.scored)
        if not self._unlimited and (self._is_over_limit or documents > SENTENCES or self._words > WORDS):
            self._is_over_limit = True
            self._gold, self._predicted = [], []
            return
        self._gold += _tag_lists(block.gold)
        self._predicted += _tag_lists(block.predicted)

    def apply(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Replaces the scores by those of seqeval, and adds ``headline``, which says who computed them.

        Args:
            scores: What ``ChunkCounts.scores`` returned.

        Raises:
            EvaluationError: a score differs from seqeval's by more than ``TOLERANCE``.
        """
        if self._is_over_limit:
            reason = f"more than {SENTENCES:,} documents or {WORDS:,} words; score them with --seqeval"
            return {**scores, "headline": {"by": "nermill", "reason": reason}}
        if not self._words:
            return {**scores, "headline": {"by": "nermill", "reason": "no words"}}
        theirs = self._score()
        worst = 0.0
        for name, ours, figure in _pairs(scores, theirs):
            if not abs(ours - figure) <= TOLERANCE:
                raise EvaluationError(
                    f"seqeval's {name} is {figure!r}, nermill's counts give {ours!r}: one of the two is wrong, and no "
                    "report is written; please report it with the run's parts"
                )
            worst = max(worst, abs(ours - figure))
        headline = {"by": "seqeval", "version": version("seqeval"), "largest_difference": worst}
        return {**_merged(scores, theirs), "headline": headline}

    def _score(self) -> dict[str, Any]:
        """seqeval's scores with the report's names, in conlleval mode and in strict IOB2."""
        from seqeval import metrics
        from seqeval.scheme import IOB2

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about labels without predictions, and means over no label
            modes: list[dict[str, Any]] = [{}, {"mode": "strict", "scheme": IOB2}]
            conlleval, strict = (
                self._named(
                    metrics.classification_report(
                        self._gold, self._predicted, output_dict=True, zero_division=0, **mode
                    )
                )
                for mode in modes
            )
            accuracy = float(metrics.accuracy_score(self._gold, self._predicted))
        return {**conlleval, "accuracy": accuracy, "strict": strict}

    def _named(self, report: dict[str, Any]) -> dict[str, Any]:
        rows = {name: {ours: float(row[theirs]) for ours, theirs in _NAMES.items()} for name, row in report.items()}
        per_label = {self._labels.names[int(name)]: row for name, row in rows.items() if name.isdecimal()}
        return {**rows["micro avg"], "per_label": per_label}


def _tag_lists(tags: Tags) -> list[list[str]]:
    """The documents' tags for seqeval; labels are written as numbers, since seqeval strips dashes from names."""
    label = np.where(tags.prefix == O, 0, tags.label)
    code = np.where(tags.prefix == O, 0, 1 + 2 * label + (tags.prefix != B))
    kinds, at = np.unique(code, return_inverse=True)
    names = ["O" if kind == 0 else f"{'BI'[(kind - 1) % 2]}-{(kind - 1) // 2}" for kind in kinds.tolist()]
    flat = [names[n] for n in at.tolist()]
    offsets = tags.offsets.tolist()
    return [flat[start:end] for start, end in pairwise(offsets)]


def _pairs(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, float, float]]:
    """Name, nermill's value and seqeval's value of each score; NaN for a label that only one of the two has."""
    if not isinstance(theirs, dict):
        yield name, ours, theirs
        return
    keys = theirs.keys() | ours.keys() if name.endswith("per_label") else theirs.keys()
    nothing = dict.fromkeys(_NAMES, float("nan"))
    for key in sorted(keys):
        yield from _pairs(ours.get(key, nothing), theirs.get(key, nothing), f"{name} {key}".strip())


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _merged(value, theirs[name]) if isinstance(value, dict) and name in theirs else theirs.get(name, value)
        for name, value in ours.items()
    }
